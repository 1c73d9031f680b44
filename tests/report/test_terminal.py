from __future__ import annotations

import io

from rich.console import Console

from diffharness.records import Divergence, Finding, LayerRow, RunRecord, Verdict
from diffharness.report import terminal
from diffharness.settings import EngineSettings


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
    assert row.split() == ["blk.19.attn_q", "6.0e-11", "2.0e-11", "1.0e-08", "1.0e-03", "17", "ok"]


def test_the_worst_case_fits_too_and_is_shown_as_text(hostile: RunRecord) -> None:
    text = terminal.to_text(hostile)
    *lines, after, _, reproduce = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert after.startswith("Next: ") and reproduce.startswith("Reproduce: ")  # to be copied, so never wrapped
    assert "\x1b" not in text and "\u202e" not in text
    assert "[red]" in text


def test_at_80_columns_names_and_numbers_stay_whole(plain: RunRecord) -> None:
    plain.legs.graph.taps[19].tap = "blk.19.attn_post_norm"
    text = terminal.to_text(plain, width=80)
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if "blk.19.attn_post_norm" in line)
    assert row.split()[1:] == ["6.0e-11", "2.0e-11", "1.0e-08", "1.0e-03", "17", "ok"]


def test_colours_come_only_from_us(hostile: RunRecord) -> None:
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system="standard").print(terminal.report(hostile))
    assert "\x1b[31m @someone" not in out.getvalue()
    assert "\\u{1b}" in out.getvalue()


def test_a_failure_says_which_kinds_of_layers_and_which_positions(hostile: RunRecord) -> None:
    graph = hostile.legs.graph
    graph.per_layer = [
        LayerRow(layer=il, kind="global" if il == 5 else "sliding", nmse_local=0.1 * il, tap=f"blk.{il}.x", ok=il == 5)
        for il in range(6)
    ]
    text = terminal.to_text(hostile, width=200)
    assert "sliding: 5 of 5 fail, worst local NMSE 4.0e-01 at blk.4.x; global: 0 of 1 fail" in text
    assert "0-15 ok, worst token 1.0e-01" in text
    graph.status = "pass"
    assert "of 5 fail" not in terminal.to_text(hostile, width=200)


def test_a_cosine_is_shown_where_it_tells_something(plain: RunRecord) -> None:
    assert " cos " not in terminal.to_text(plain)
    plain.legs.graph.taps[19].cos = 0.97456
    text = terminal.to_text(plain)
    assert " cos " in text and "0.9745" in text and "0.9999" in text


def test_only_settings_that_differ_are_shown(plain: RunRecord) -> None:
    assert plain.subject.engine is not None
    plain.subject.engine.settings = EngineSettings(threads=3, n_ubatch=64).model_dump(mode="json")
    line = next(line for line in terminal.to_text(plain).splitlines() if line.startswith("settings  "))
    assert line.split(maxsplit=1)[1] == "native · n_ubatch 64 · 3 threads"
    plain.subject.engine.settings = EngineSettings(threads=1).model_dump(mode="json")
    assert " · 1 thread\n" in terminal.to_text(plain)


def test_the_machine_in_words(plain: RunRecord) -> None:
    plain.subject.machine = {"cpu": "EPYC", "flags": ["avx2"], "cores": 2, "memory_bytes": 1 << 34, "python": "3.11.7"}
    assert "EPYC · avx2 · 2 cores · 16.0 GiB · Python 3.11.7" in terminal.to_text(plain)


def test_accusations_that_nan_in_the_file_explains_are_not_repeated(plain: RunRecord) -> None:
    nan = "the file holds NaN or infinity: 1 values in blk.1.attn_norm.weight"
    plain.findings = [
        Finding(kind="artifact.file", leg="artifact", message=nan),
        Finding(kind="engine.graph", leg="graph", message="llama.cpp computes something else"),
        Finding(kind=None, leg="kernel", message="the first value that is not finite"),
    ]
    plain.first_divergence = Divergence(leg="graph", tap="blk.1.attn_norm", layer=1, token=0, nmse=float("inf"))
    plain.verdict = Verdict(primary="artifact.file", all=["artifact.file"], summary=f"{nan}.", next_step=None)
    text = terminal.to_text(plain)
    assert "something else" not in text and "kernel: the first value that is not finite" in text
    assert terminal.line(plain) == f"artifact.file: {nan}."
    plain.verdict = Verdict(primary="engine.graph", all=["engine.graph"], summary="x", next_step=None)
    assert "First divergence" in terminal.line(plain)  # elsewhere, where it begins is what tells most
