"""A bisection as it is printed: the list in its order, the reasons, what to do next."""

from __future__ import annotations

import pytest

from diffharness.records.bisect import BisectRecord, StepRow
from diffharness.records.legs import LogitStats
from diffharness.records.subject import ArtifactSubject
from diffharness.report.bisect import document, line
from diffharness.report.document import to_markdown, to_text
from tests.report.conftest import EVIL


def record(*, verdicts: bool = True, **changes: object) -> BisectRecord:
    near, far = (LogitStats(nmse=x, kl_mean=x / 2, kl_p99=x, kl_max=x, top1=1.0, n=31) for x in (0.0, 9.6e-4))
    kinds = {"verdicts": ["agree"]} if verdicts else {}
    steps = [
        StepRow(index=0, engine="a/bin", state="first", version="1", commit="beef", logits=near, ppl=4.5, **kinds),
        StepRow(index=3, engine="d/bin", state="changed", reason="logits NMSE 9.6e-04", logits=far, ppl=4.6, **kinds),
        StepRow(index=1, engine="b/bin", state="same", logits=near, ppl=4.5, **kinds),
        StepRow(index=2, engine="c/bin", state="skipped", reason=f"it says {EVIL}"),
    ]
    fields = {
        "outcome": "unclear", "summary": "said.", "engines": ["a/bin", "b/bin", "c/bin", "d/bin"], "on": "either",
        "floor": 1e-6, "steps": steps, "artifact": ArtifactSubject(path="m.gguf"),
        "next_step": "diffharness run m.gguf",
    }  # fmt: skip
    return BisectRecord.model_validate({**fields, **changes})


def test_the_list_is_told_in_its_order() -> None:
    text = to_text(document(record()))
    places = [text.index(name) for name in ("a/bin", "b/bin", "c/bin", "d/bin")]
    assert places == sorted(places) and "4, of which 4 were run" in text
    assert text.startswith("verdict: inconclusive") and "Next: diffharness run m.gguf" in text
    assert "\x1b" not in text and "d/bin: logits NMSE 9.6e-04" in text


def test_without_verdicts_there_is_no_column_of_them() -> None:
    assert " verdict " in to_text(document(record()))
    assert " verdict " not in to_text(document(record(verdicts=False, on="numbers")))


@pytest.mark.parametrize(("outcome", "told"), [("unchanged", "pass"), ("changed", "fail"), ("unclear", "inconclusive")])
def test_outcomes(outcome: str, told: str) -> None:
    assert to_markdown(document(record(outcome=outcome))).startswith(f"### diffharness bisect: {told}")


def test_one_engine_as_a_line() -> None:
    first, changed, same, _ = record().steps
    assert line(first) == "0: a/bin · first · agree"
    assert line(changed) == "3: d/bin · changed · agree · logits NMSE 9.6e-04"
    assert line(same) == "1: b/bin · same · agree · logits NMSE 0"
