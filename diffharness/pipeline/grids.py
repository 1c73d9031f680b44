"""Grids of engine settings: configs/matrix.yaml and files of its form, checked, and cells chosen from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffharness.engine.feeding import Feed
from diffharness.engine.runner import check_overrides
from diffharness.errors import SettingsError
from diffharness.legs.settings import FloorClass
from diffharness.settings import EngineSettings, configs_dir, load_engine, load_yaml

DEFAULT = "default"
_LENGTHS = {"length-1": -1, "length": 0, "length+1": 1}


class Cell(BaseModel):
    """One way to run the engine that must not matter; configs/matrix.yaml says what each field means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str = ""
    dimension: str = Field(min_length=1)
    settings: dict[str, Any] = {}
    feed: Feed = Feed()
    against: Feed | None = None
    callback: bool = False
    engine: str | None = None
    overrides: tuple[str, ...] = ()
    floor: FloorClass
    windowed: FloorClass | None = None
    lossy: bool = False

    @field_validator("settings")
    @classmethod
    def _known(cls, settings: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(settings.keys() - EngineSettings.model_fields.keys())
        if unknown:
            raise ValueError(f"no such engine setting: {', '.join(unknown)}")
        return settings

    @model_validator(mode="after")
    def _fit(self) -> Cell:
        check_overrides(self.overrides)
        return self

    def floor_for(self, *, windowed: bool) -> FloorClass:
        return self.windowed if windowed and self.windowed is not None else self.floor

    def resolved(self, base: EngineSettings, longest: int) -> EngineSettings:
        """The cell's engine settings; SettingsError where they do not go together with those of the base."""
        start = base
        if self.engine is not None:
            start = load_engine(self.engine).changed(threads=base.threads, time_limit_s=base.time_limit_s)
        changes = {
            key: max(1, longest + _LENGTHS[value]) if isinstance(value, str) and value in _LENGTHS else value
            for key, value in self.settings.items()
        }
        if "n_ubatch" in changes and "n_batch" not in changes:
            changes["n_batch"] = max(start.n_batch, changes["n_ubatch"])
        if "n_batch" in changes and "n_ubatch" not in changes:
            changes["n_ubatch"] = min(start.n_ubatch, changes["n_batch"])
        try:
            return start.changed(**changes)
        except ValidationError as error:
            told = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise SettingsError(f"{self.label}: {told}") from error

    @property
    def is_repeat(self) -> bool:
        """Nothing is changed: the base again."""
        return self == Cell(label=self.label, dimension=self.dimension, floor=self.floor, windowed=self.windowed)


class Grid(BaseModel):
    """Cells by label, and lists of labels or shell patterns by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grids: dict[str, list[str]] = {}
    cells: dict[str, Cell] = Field(min_length=1)

    @model_validator(mode="after")
    def _named(self) -> Grid:
        for name, patterns in self.grids.items():
            for pattern in patterns:
                if not any(fnmatchcase(label, pattern) for label in self.cells):
                    raise ValueError(f"grid {name}: no cell is called {pattern}")
        return self

    def chosen(self, name: str | None) -> list[Cell]:
        """The cells of a grid in its order, each once; all of them without a name."""
        patterns = ["*"] if name is None else self.grids[name]
        labels = dict.fromkeys(label for pattern in patterns for label in self.cells if fnmatchcase(label, pattern))
        return [self.cells[label].model_copy(update={"label": label}) for label in labels]


def load_grid(name_or_path: str = DEFAULT, substrings: Sequence[str] = ()) -> list[Cell]:
    """The cells of a grid of configs/matrix.yaml, or of a file: its grid `default`, or all of its cells.

    `substrings` keep the cells whose label or dimension holds one of them. SettingsError for an unknown name, an
    unfit file, or if nothing is left.
    """
    is_file = Path(name_or_path).suffix in (".yaml", ".yml")
    path = Path(name_or_path) if is_file else configs_dir() / "matrix.yaml"
    grid = _at(load_yaml(Grid, path), path) if is_file else load_yaml(Grid, path)
    name = (DEFAULT if DEFAULT in grid.grids else None) if is_file else name_or_path
    if name is not None and name not in grid.grids:
        known = ", ".join(sorted(grid.grids))
        raise SettingsError(f"no grid is called {name}", hint=f"known: {known}; or give a file that ends in .yaml")
    cells = grid.chosen(name)
    kept = [cell for cell in cells if not substrings or _matches(cell, substrings)]
    if not kept:
        labels = ", ".join(cell.label for cell in cells)
        raise SettingsError(f"no cell's label or dimension holds {' or '.join(substrings)}", hint=f"cells: {labels}")
    return kept


def _matches(cell: Cell, substrings: Sequence[str]) -> bool:
    return any(part.lower() in f"{cell.label}\n{cell.dimension}".lower() for part in substrings)


def _at(grid: Grid, path: Path) -> Grid:
    """Engine files that a grid's cells name are meant from where the grid's file is."""

    def placed(cell: Cell) -> Cell:
        if cell.engine is None or Path(cell.engine).suffix not in (".yaml", ".yml"):
            return cell
        return cell.model_copy(update={"engine": str(path.parent / cell.engine)})

    cells: Mapping[str, Cell] = {label: placed(cell) for label, cell in grid.cells.items()}
    return grid.model_copy(update={"cells": dict(cells)})
