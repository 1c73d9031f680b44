"""The gate's line per rule, for people."""

from __future__ import annotations

import pytest

from diffharness.forensics.gate import NotRun, conclude, judge, load_gate
from diffharness.records.base import parse
from diffharness.records.gate import GateRecord, GateScores, RuleRow
from diffharness.records.grade import Estimate
from diffharness.records.subject import ArtifactSubject, CheckpointSubject, FixtureSubject, Subject
from diffharness.report.document import to_markdown, to_text
from diffharness.report.gate import document, limit, measured
from tests.forensics.gate.evidence import evidence, graded
from tests.report.conftest import EVIL


def record(path: str = "m.gguf", **others: object) -> GateRecord:
    rows = judge(load_gate(), evidence(**others))
    outcome, summary = conclude(rows)
    return GateRecord(
        outcome=outcome,
        summary=summary,
        gate="configs/gate.yaml",
        rules=rows,
        scores=GateScores(artifact=Estimate(value=2.002), checkpoint=Estimate(value=2.0, error=0.1)),
        subject=Subject(
            artifact=ArtifactSubject(path=path, n_bytes=3 << 20),
            checkpoint=CheckpointSubject(path="checkpoint"),
            fixture=FixtureSubject(name="heldout", n_tokens=2048, n_scored=1020),
        ),
        repro="diffharness gate m.gguf",
        timings={"total": 1.25},
    )


def test_a_line_per_rule() -> None:
    text = to_text(document(record()))
    assert text.startswith("pass\n13 rules pass")
    for words in (
        "checkpoint 2.0000 ± 0.1000 · artifact 2.0020",
        "heldout: 2048 tokens, 1020 scored",
        "Reproduce: diffharness gate m.gguf",
    ):
        assert words in text
    assert sum(" pass " in line for line in text.splitlines()) == 13
    assert max(map(len, text.splitlines())) <= 100


def test_what_fails_is_listed() -> None:
    found = record(grade=graded(ratio=1.3), tokens=NotRun("no text"))
    text = to_text(document(found))
    assert found.outcome == "fail" and text.startswith("fail\n1 of 13 rules fail: perplexity (4 bits and up)")
    assert "not run" in text and "30%" in text
    assert "| not run |" in to_markdown(document(found))


def test_the_record_reads_back() -> None:
    found = record(grade=graded(ratio=float("inf")))
    assert parse(GateRecord, found.to_json(), "there") == found


@pytest.mark.parametrize(
    ("value", "bound", "most", "unit", "shown"),
    [
        (0, "at_most", 0, "", ("0", "<= 0")),
        (0.99989999, "at_least", 0.9999, "", ("0.99989999", ">= 0.9999")),
        (0.9974092, "at_least", 0.99, "", ("0.997409", ">= 0.99")),
        (5.00001, "at_most", 5, "%", ("5.00001%", "<= 5%")),
        (-0.25, "at_most", 5, "%", ("-0.25%", "<= 5%")),
        (3.24e-4, "at_most", 0.06, "", ("3.2e-04", "<= 0.06")),
        (float("inf"), "at_most", 0.06, "", ("inf", "<= 0.06")),
        (float("nan"), "at_most", 0.06, "", ("nan", "<= 0.06")),
    ],
)
def test_numbers_never_round_to_the_other_side(value, bound, most, unit, shown) -> None:  # type: ignore[no-untyped-def]
    row = RuleRow(rule="r", status="pass", measured=value, limit=most, bound=bound, unit=unit, message="m")
    assert (measured(row), limit(row)) == shown


def test_names_from_files_are_harmless() -> None:
    shown = document(record(EVIL))
    for text in (to_text(shown), to_markdown(shown)):
        assert "\x1b" not in text and "\u202e" not in text
    assert "<script>" not in to_markdown(shown)
