from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffharness.records import ArtifactSubject, RunRecord, Subject, Verdict
from diffharness.report import markdown
from diffharness.report._format import clean


def test_a_plain_run_says_everything(plain: RunRecord) -> None:
    text = markdown.to_markdown(plain)
    assert text.startswith("### diffharness: agree\n")
    for part in (
        "| graph | strict vs reference | pass | 4.1e-13 | 5.0e-09 | 2.0e-08 | 99.60% |",
        "| kernel | native vs strict | not judged | 1.4e-04 |",
        "| artifact | artifact vs checkpoint | not run | - |",
        "| perplexity | reference on artifact | engine: strict |\n| --- | --: | --: |\n|  | 16.0312 | 16.0312 |",
        "| settings | flash_attn off |",
        "10 worst of 20 taps",
        "| blk.19.attn_q | 6.0e-11 | 2.0e-11 | 1.0e-08 |",
        "m.gguf · llama · 134.5M parameters",
        "Reproduce: `diffharness run m.gguf --tokens 512`",
        "Next: `diffharness run m`",
    ):
        assert part in text, part
    assert text.count("| blk.") == 10


def test_the_worst_case_fits_an_issue_with_all_its_parts(hostile: RunRecord) -> None:
    lines = markdown.to_markdown(hostile).splitlines()
    assert len(lines) <= markdown.MAX_LINES
    text = "\n".join(lines)
    for part in (
        "### diffharness: engine.graph",
        "| subject |",
        "| leg |",
        "- First divergence",
        "- Layers: ",
        "- Positions: ",
        "| control | control vs checkpoint | - |",
        "| tap |",
        "Next: ",
        "Reproduce: ",
    ):
        assert part in text, part
    assert "and 54 more" in text
    assert sum(len(line) for line in lines) < 60_000  # GitHub takes 65536


def test_hostile_strings_cannot_become_markup(hostile: RunRecord) -> None:
    text = markdown.to_markdown(hostile)
    outside_code = re.sub(r"(`+)[^`].*?[^`]\1(?!`)", "", text.split("Next: ")[0])
    assert "\x1b" not in text and "\u202e" not in text
    assert "<script>" not in outside_code.replace("\\<script\\>", "")
    assert "@someone" not in text.split("Next: ")[0]
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 7, 8, 9), line
    assert [line for line in text.splitlines() if line.startswith("#")] == ["### diffharness: engine.graph"]


@given(st.text(max_size=60))
def test_code_spans_hold_any_text(text: str) -> None:
    span = markdown.code(text)
    ticks = re.match("`+", span)
    assert ticks is not None and "\n" not in span
    inside = span[len(ticks[0]) : -len(ticks[0])]
    assert ticks[0] not in re.findall("`+", inside)
    assert inside.strip(" ") == clean(text).strip(" ")


@given(st.text(max_size=80))
def test_any_summary_stays_one_line(text: str) -> None:
    record = RunRecord(
        verdict=Verdict(primary="inconclusive", all=["inconclusive"], summary=text),
        subject=Subject(artifact=ArtifactSubject(path=text)),
    )
    assert len(markdown.to_markdown(record).splitlines()) == len(markdown.to_markdown(record).split("\n")) - 1 <= 20


def test_names_with_underscores_stay_readable() -> None:
    assert markdown.escape("blk.0.attn_q_rope at 1e-8") == "blk.0.attn_q_rope at 1e-8"


def test_an_artifact_leg_alone_shows_its_taps_against_the_control(hostile: RunRecord) -> None:
    hostile.legs.graph.taps = []
    hostile.legs.artifact.taps[0].nmse_control = 1e-3
    text = markdown.to_markdown(hostile)
    assert "artifact and control, from the checkpoint" in text and "| control |" in text and "1.0e-03" in text


def test_where_only_the_artifact_leg_fails_its_taps_are_shown(hostile: RunRecord) -> None:
    hostile.legs.graph.status = "pass"
    assert "artifact and control, from the checkpoint" in markdown.to_markdown(hostile)
    hostile.legs.artifact.status = "pass"
    assert "NMSE end to end, and local" in markdown.to_markdown(hostile)


@pytest.mark.parametrize("field", ["scores", "findings", "first_divergence", "repro"])
def test_what_is_absent_leaves_no_empty_part(plain: RunRecord, field: str) -> None:
    empty = plain.model_copy(update={field: type(plain).model_fields[field].get_default()})
    text = markdown.to_markdown(empty)
    assert "\n\n\n" not in text and not text.endswith("\n\n")
