from __future__ import annotations

import io

from rich.console import Console

from diffharness.records import RunRecord
from diffharness.report import terminal


def test_a_plain_run_fits_100_columns(plain: RunRecord) -> None:
    text = terminal.to_text(plain)
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "verdict: agree",
        "4.1e-13",
        "5.0e-09",
        "99.60%",
        "blk.19.attn_q",
        "16.0312",
        "node replay is not built yet",
    ):
        assert part in text, part
    assert "Next: diffharness run m" in text and "Reproduce: diffharness run m.gguf" in text
    row = next(line for line in text.splitlines() if "blk.19.attn_q" in line)
    assert row.split() == ["blk.19.attn_q", "6.0e-11", "2.0e-11", "1.0e-08", "0.999999", "1.0e-03", "17", "ok"]


def test_the_worst_case_fits_too_and_is_shown_as_text(hostile: RunRecord) -> None:
    text = terminal.to_text(hostile)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text and "\u202e" not in text
    assert "[red]" in text


def test_at_80_columns_names_and_numbers_stay_whole(plain: RunRecord) -> None:
    plain.legs.graph.taps[19].tap = "blk.19.attn_post_norm"
    text = terminal.to_text(plain, width=80)
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if "blk.19.attn_post_norm" in line)
    assert row.split()[1:] == ["6.0e-11", "2.0e-11", "1.0e-08", "0.999999", "1.0e-03", "17", "ok"]


def test_colours_come_only_from_us(hostile: RunRecord) -> None:
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system="standard").print(terminal.report(hostile))
    assert "\x1b[31m @someone" not in out.getvalue()
    assert "\\u{1b}" in out.getvalue()
