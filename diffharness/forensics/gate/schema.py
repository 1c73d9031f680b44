"""The form of a gate file: rules by name, each with a limit, or a limit by bits per weight.

    rules:
      metadata: {at_most: 0}
      cosine: {at_least: {8: 0.9999, 4: 0.99}}    # from 8 bits on, from 4 bits on; fewer bits: not judged
      tokens: {at_most: 0, optional: true}        # may pass where it could not be run

A rule that the file does not name is not asked for. One that it names and that could not be run is never a pass.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from diffharness.errors import SettingsError
from diffharness.forensics.gate.readings import KINDS
from diffharness.settings import configs_dir, load_yaml

Bound = Literal["at_most", "at_least"]


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | dict):
        raise ValueError(f"expected a number, found {value!r}")
    return value


Finite = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
ByBits = Annotated[dict[Annotated[float, Field(ge=0, allow_inf_nan=False)], Finite], Field(min_length=1)]


class Rule(BaseModel):
    """One limit; `optional` lets the gate pass where the rule could not be run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_most: Finite | ByBits | None = None
    at_least: Finite | ByBits | None = None
    optional: bool = False

    @model_validator(mode="after")
    def _one(self) -> Rule:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("expected one of at_most and at_least")
        return self

    @property
    def bound(self) -> Bound:
        return "at_least" if self.at_most is None else "at_most"

    @property
    def limits(self) -> dict[float, float]:
        """Limit by the bits per weight from which on it holds, the most bits first."""
        value = self.at_least if self.at_most is None else self.at_most
        assert value is not None, "checked on reading"
        return dict(sorted(value.items(), reverse=True)) if isinstance(value, dict) else {0.0: value}

    @property
    def by_bits(self) -> bool:
        return isinstance(self.at_least if self.at_most is None else self.at_most, dict)

    def class_of(self, bits: float) -> float | None:
        """The bits per weight whose limit holds for `bits`; None below them all."""
        return next((least for least in self.limits if bits >= least), None)

    def passes(self, value: float, limit: float) -> bool:
        """NaN passes nothing."""
        return value <= limit if self.bound == "at_most" else value >= limit


class Gate(BaseModel):
    """Every rule of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: Annotated[dict[str, Rule], Field(min_length=1)]

    @model_validator(mode="after")
    def _known(self) -> Gate:
        for name, rule in self.rules.items():
            kind = KINDS.get(name)
            if kind is None:
                raise ValueError(f"no rule is called {name!r}; known: {', '.join(KINDS)}")
            if rule.bound != kind.bound:
                raise ValueError(f"rule {name} needs {kind.bound}, found {rule.bound}")
            if rule.by_bits and not kind.by_bits:
                raise ValueError(f"rule {name} has one limit, not one by bits per weight")
        return self


def load_gate(path: str | os.PathLike[str] | None = None) -> Gate:
    """The rules of configs/gate.yaml, or of another file of the same form; SettingsError if it is none."""
    file = Path(path) if path is not None else configs_dir() / "gate.yaml"
    try:
        return load_yaml(Gate, file)
    except SettingsError as error:
        raise SettingsError(error.message, hint=error.hint or "configs/gate.yaml explains each rule") from error
