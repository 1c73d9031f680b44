"""The report of a restoration: ladders with both ends, the search in words, hostile names, 100 columns."""

from __future__ import annotations

import math
from typing import Any

from diffharness.records import ArtifactSubject, FixtureSubject, Subject, Verdict
from diffharness.records.restore import GroupScore, LineageMarks, MixtureScore, RestoreRecord, SearchResult
from diffharness.report.document import to_markdown, to_text
from diffharness.report.restore import document
from tests.report.conftest import EVIL


def score(ppl: float, kl: float = 0.1) -> MixtureScore:
    return MixtureScore(ppl=ppl, nll=math.log(ppl) if math.isfinite(ppl) else math.inf, n=255, kl_mean=kl)


def group(name: str, ppl: float, **more: Any) -> GroupScore:
    told: dict[str, Any] = {"into": "artifact", "change": -0.5, "error": 0.05, "told": "better", "tensors": ["a", "b"]}
    return GroupScore(**score(ppl).model_dump(), group=name, **(told | more))


def record(**more: Any) -> RestoreRecord:
    told: dict[str, Any] = {
        "verdict": Verdict(primary="artifact.weights", all=["artifact.weights"], summary="S.", next_step="search it"),
        "subject": Subject(
            artifact=ArtifactSubject(path="m.gguf"), fixture=FixtureSubject(name="text", n_tokens=512, n_scored=255)
        ),
        "scores": {"artifact": score(364.0), "checkpoint": score(4.68, 0.0), "control": score(4.7, 1e-3)},
        "groups": [
            group("layer_output_scale", 97.0, drifted=2),
            group("attn_q", 350.0, told="same", error=None),
            group("norms", 364.0, change=0.0, told="same"),
            group("ffn_down", 8.0, into="checkpoint", change=0.6, told="worse"),
        ],
        "layer_kinds": ["sliding"] * 4, "forwards": 10, "layers_run": 30,
        "repro": "diffharness restore m.gguf --checkpoint c",
    }  # fmt: skip
    return RestoreRecord(**(told | more))


def search(**more: Any) -> SearchResult:
    told: dict[str, Any] = {
        "target": 4.7, "target_of": "control", "within": 0.01, "reached": True, "words": "ffn_down in only layer 3",
        "tensors": ["blk.3.ffn_down.weight"], "groups": ["ffn_down, layer 3"], "score": score(4.71), "minimal": True,
        "finest": True, "forwards": 12, "budget": 60,
    }  # fmt: skip
    return SearchResult(**(told | more))


def lines(text: str, beginning: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(beginning)]


def test_a_ladder_runs_from_the_artifact_to_the_checkpoint() -> None:
    text = to_text(document(record()))
    assert max(map(len, text.splitlines())) <= 100
    first, second = text.split("Harm: ")
    order = ["artifact  ", "layer_output_scale", "attn_q", "norms", "control", "checkpoint"]
    at = [first.index(name, first.index("mean KL")) for name in order]
    assert at == sorted(at)
    assert lines(first, "layer_output_scale")[0].split() == [
        "layer_output_scale", "2", "2", "97.0000", "-0.500", "0.050", "1.0e-01", "better",
    ]  # fmt: skip
    assert lines(first, "attn_q")[0].split()[-2:] == ["-", "1.0e-01"], "no error, and nothing told"
    assert lines(first, "norms")[0].endswith("equal")
    assert second.index("checkpoint") < second.index("ffn_down") < second.rindex("artifact")
    assert "10, 75% of their layers run" in first and "Next: search it" in second
    markdown = to_markdown(document(record()))
    assert "| layer_output_scale | 2 | 2 | 97.0000 | -0.500 | 0.050 | 1.0e-01 | better |" in markdown


def test_a_search_in_words() -> None:
    text = " ".join(to_text(document(record(groups=[], search=search()))).split())
    assert "perplexity 4.7000 of the control, within 1.00%" in text and "ffn_down in only layer 3" in text
    assert "364.0000 -> 4.7100" in text and "nor cut into fewer layers" in text and "12 of at most 60" in text
    text = to_text(document(record(groups=[], search=search(minimal=False, finest=False))))
    assert "not known: the budget ended" in text
    text = " ".join(to_text(document(record(search=search(finest=False)))).split())
    assert "the budget ended before they were cut" in text
    failed = search(reached=False, minimal=False, score=None, groups=[])
    assert "everything, and it was not enough" in to_text(document(record(search=failed)))


def test_lineage_and_numbers_that_are_none() -> None:
    marks = LineageMarks(spread=True, mark="coherent", additivity=0.214)
    broken = {"artifact": score(math.inf, math.inf), "checkpoint": score(4.0)}
    text = to_text(document(record(lineage=marks, scores=broken)))
    assert "0.21 (1: the parts know nothing of each other)" in text and "inf" in text


def test_hostile_names_are_harmless() -> None:
    shown = document(record(groups=[group(EVIL, 1.0, keys=[EVIL])], search=search(words=EVIL)))
    for text in (to_text(shown), to_markdown(shown)):
        assert "\x1b" not in text and "\u202e" not in text


def test_nothing_is_said_of_a_change_from_infinite_to_infinite() -> None:
    text = to_text(document(record(groups=[group("attn_q", math.inf, change=math.nan, error=None, told="same")])))
    assert "nan" not in text
