"""The ladder as text and Markdown: every recipe a row, names from files harmless, nothing cut at 100 columns."""

from __future__ import annotations

from diffharness.records.grade import Estimate, KlStatistics
from diffharness.records.recipe import Baseline, RecipeRecord, Rung, Written
from diffharness.records.subject import CheckpointSubject, FixtureSubject
from diffharness.report.document import to_markdown, to_text
from diffharness.report.recipe import document
from tests.report.conftest import EVIL


def statistics(ppl: float, error: float | None = 0.13) -> KlStatistics:
    def estimate(value: float) -> Estimate:
        return Estimate(value=value, error=error)

    return KlStatistics(
        n=255, ppl=estimate(ppl), ppl_base=estimate(2.0), ln_ratio=estimate(0.01), ratio=estimate(1.01),
        difference=estimate(ppl - 2.0), kl=estimate(2.7e-3), kl_quantiles={}, p_diff=estimate(0.0),
        p_diff_quantiles={}, p_diff_rms=estimate(0.1), top1=estimate(0.9294),
    )  # fmt: skip


def record(name: str = "int4", **more: object) -> RecipeRecord:
    common: dict[str, object] = {"n_bytes": 2 << 20, "bits_per_weight": 4.58}
    rungs = [
        Rung.model_validate(
            {
                **common, "name": name, "about": "all int4", "schemes": {"int4 block 32": 83, "F32": 86},
                "can_be_written": False, "statistics": statistics(2.0391),
            }
        ),
        Rung.model_validate(
            {
                **common, "name": "Q4_0", "schemes": {"Q4_0": 83}, "fell_back": [f"t{i}" for i in range(7)],
                "can_be_written": True, "statistics": statistics(float("inf"), None),
            }
        ),
    ]  # fmt: skip
    return RecipeRecord.model_validate(
        {
            "ladder": "gemma4",
            "baseline": Baseline(ppl=Estimate(value=2.0312, error=0.1333), bits_per_weight=16, n_bytes=9, n_params=5),
            "rungs": rungs,
            "checkpoint": CheckpointSubject(path="checkpoint"),
            "fixture": FixtureSubject(name="heldout", n_tokens=512, n_scored=255),
            "repro": "diffharness recipe",
            **more,
        }
    )


def test_every_recipe_is_a_row() -> None:
    text = to_text(document(record()))
    assert "2 recipes (ladder gemma4)" in text
    assert "checkpoint  16.00  2.0312 ± 0.1333" in text
    assert "2.0391 ± 0.1300  +0.0391 ± 0.1300  2.7e-03 ± 1e-01  92.94% ± 13.00" in text
    assert "inf" in text and "all int4; 2.0 MiB (int4 block 32: 83, F32: 86)" in text
    assert "t0, t1, t2, t3, t4 and 2 more" in " ".join(text.split())
    assert "Reproduce: diffharness recipe" in text
    assert max(map(len, text.splitlines())) <= 100


def test_markdown_has_the_same_table() -> None:
    lines = to_markdown(document(record())).splitlines()
    assert lines[0] == "### diffharness recipe"
    assert "| recipe | bits | perplexity | Δ | mean KL | top-1 |" in lines
    assert sum(line.startswith(("| checkpoint |", "| int4 |", "| Q4\\_0 |", "| Q4_0 |")) for line in lines) >= 3


def test_the_written_file_is_told() -> None:
    made = Written(path="out.gguf", recipe="int4", sha256="ab" * 32, n_bytes=1 << 20, ppl=2.0391)
    text = " ".join(to_text(document(record(written=made))).split())
    assert "written: out.gguf (1.0 MiB, sha256 abababababababab)" in text
    assert "perplexity 2.0391, simulated 2.0391" in text


def test_names_from_files_are_harmless() -> None:
    found = record(EVIL, checkpoint=CheckpointSubject(path=EVIL))
    for text in (to_text(document(found)), to_markdown(document(found))):
        assert "\x1b" not in text and "\u202e" not in text
    assert "<script>" not in to_markdown(document(found))
