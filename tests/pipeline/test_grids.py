"""Grid files: the shipped one is whole, cells resolve to settings, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffharness.errors import SettingsError
from diffharness.pipeline.grids import Cell, load_grid
from diffharness.settings import EngineSettings

BASE = EngineSettings(threads=2)
CELL = "cells:\n  one: {dimension: d, floor: rounding, %s}\n"

DIMENSIONS = {
    "n_ubatch", "n_batch", "feeding", "threads", "flash attention", "repack", "mmap", "KV type", "window cache",
    "unified KV", "sequences", "KV copied", "re-decoded", "state", "context shift", "callback", "repeat",
}  # fmt: skip


def of(tmp_path: Path, text: str) -> list[Cell]:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return load_grid(str(path))


def test_the_shipped_grids() -> None:
    full, default, small = (load_grid(name) for name in ("full", "default", "small"))
    labels = [cell.label for cell in full]
    assert len(set(labels)) == len(labels) and {cell.dimension for cell in full} == DIMENSIONS
    assert {cell.dimension for cell in default} >= DIMENSIONS - {"unified KV"}
    assert [cell.label for cell in small] == ["n_ubatch 32", "prefill, then decode"]
    for cell in full:
        for longest in (2, 300, 5000):
            cell.resolved(BASE, longest)
    assert [cell.label for cell in full if cell.is_repeat] == ["again"]


def test_lengths_are_counted_from_the_text() -> None:
    cells = {cell.label: cell for cell in load_grid("full")}
    for label, n_ubatch in (("n_ubatch length-1", 299), ("n_ubatch length", 300), ("n_ubatch length+1", 301)):
        assert cells[label].resolved(BASE, 300).n_ubatch == n_ubatch
    long = cells["n_ubatch length+1"].resolved(BASE, 5000)
    assert long.n_ubatch == 5001 and long.n_batch == 5001
    assert cells["n_batch length-1"].resolved(BASE, 300).n_ubatch == 299
    assert cells["n_ubatch length-1"].resolved(BASE, 1).n_ubatch == 1


def test_only_the_window_changes_a_floor() -> None:
    (cell,) = load_grid("default", ["state"])
    assert (cell.floor_for(windowed=False), cell.floor_for(windowed=True)) == ("same", "rounding")


def test_cells_are_chosen_by_label_or_dimension() -> None:
    assert {cell.dimension for cell in load_grid("full", ["kv type"])} == {"KV type"}
    assert [cell.label for cell in load_grid("default", ["MMAP", "again"])] == ["again", "mmap off"]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("n_ubatch: 64\n")
    (cell,) = of(tmp_path, CELL % "engine: other.yaml")
    settings = cell.resolved(BASE, 100)
    assert settings.n_ubatch == 64 and settings.threads == 2
    chosen = of(
        tmp_path, CELL % "feed: {way: halves}" + "  two: {dimension: d, floor: same}\ngrids: {default: [two]}\n"
    )
    assert [cell.label for cell in chosen] == ["two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CELL % "settings: {n_ubach: 7}", "no such engine setting: n_ubach"),
        (CELL % "feed: {way: sideways}", "cells.one.feed.way"),
        (CELL % "settins: {}", "no such setting"),
        (CELL % "overrides: [a]", "KEY=TYPE:VALUE"),
        ("cells:\n  one: {dimension: d, floor: exact}\n", "cells.one.floor"),
        ("cells: {}\n", "cells"),
        (CELL % "callback: true" + "grids: {default: [two]}\n", "no cell is called two"),
        ("- a\n", "a mapping was expected"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        of(tmp_path, text)


def test_unknown_names() -> None:
    with pytest.raises(SettingsError, match="no grid is called huge"):
        load_grid("huge")
    with pytest.raises(SettingsError, match="holds nonsense"):
        load_grid("default", ["nonsense"])
    with pytest.raises(SettingsError, match="cannot read"):
        load_grid("missing.yaml")


def test_settings_that_do_not_go_together_are_the_cells_reason() -> None:
    (cell,) = [cell for cell in load_grid("full") if cell.label == "KV Q8_0"]
    with pytest.raises(SettingsError, match="KV Q8_0: type_v Q8_0 needs flash attention"):
        cell.resolved(BASE.changed(flash_attn="off"), 100)
