"""The table's two forms, and the machine that it names."""

from __future__ import annotations

import pytest

from bench.__main__ import PARTS, main
from bench.table import Markdown, Text, machine_line, versions
from bench.timing import Row
from diffharness.machine import Machine

FINE = Row("ours / theirs", 0.912, 1.0, "1.1 s against 1.2 s")
OVER = Row("ours / theirs", 1.3, 1.0, "a | b")
FREE = Row("a number", 0.0321, None, "32 of 1000")


def test_text_has_columns() -> None:
    lines = [line for row in (FINE, OVER, FREE) for line in Text().row(row)]
    first = [line.split()[:3] for line in lines]
    assert first == [["0.91", "1.00", "ok"], ["1.30", "1.00", "OVER"], ["0.032", "a", "number"]]
    head = Text().start()[0]
    for line, row in zip(lines, (FINE, OVER, FREE), strict=True):
        assert line.index(row.what) == head.index("what") and line.endswith(row.detail)


def test_markdown_has_as_many_cells_in_every_line() -> None:
    table = Markdown()
    lines = [*table.start(), *table.part("Part"), *table.row(FINE), *table.row(FREE)]
    assert {line.count("|") for line in lines} == {5}
    assert table.row(FINE) == ["| ours / theirs | 0.91 | 1.00 | 1.1 s against 1.2 s |"]
    assert table.row(OVER) == ["| ours / theirs | **1.30** | 1.00 | a \\| b |"]


def test_the_machine_is_described() -> None:
    machine = Machine("Some CPU", ("sse4_2", "avx2", "avx512f"), 2, 24 << 30, "Linux 6.1 x86_64", "3.11.2")
    line = machine_line(machine, {"torch": "2.13.0"})
    assert line == "Some CPU, with avx2, avx512f, 2 cores, 24 GiB; Linux 6.1 x86_64; Python 3.11.2, torch 2.13.0"
    bare = machine_line(Machine("", (), 1, 1 << 30, "X", "3.12"), {})
    assert bare.startswith("1 core, 1 GiB; X; Python 3.12")


def test_versions_are_those_installed() -> None:
    assert {"torch", "numpy", "llama-cpp-python"} <= versions().keys()


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "nonesuch"])
    with pytest.raises(SystemExit):
        main()
    assert "nonesuch" in capsys.readouterr().err


def test_every_part_has_its_functions() -> None:
    from importlib import import_module

    for _, names in PARTS.values():
        for name in names:
            module, _, function = name.partition(":")
            assert callable(getattr(import_module(f"bench.{module}"), function)), name
