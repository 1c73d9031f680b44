"""What is known of llama.cpp that matters to slices of layers: configs/slices.yaml."""

from __future__ import annotations

import functools
import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from diffharness.settings import configs_dir, load_yaml


class Facts(BaseModel):
    """A part of the file; a name that nothing here knows is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ByDepth(Facts):
    """A key that where it is missing is `over_root` / √(number of layers)."""

    key: str
    over_root: float = Field(gt=0)

    def value(self, n_layer: int) -> float:
        """What stands for the key in a model of `n_layer` layers."""
        return self.over_root / math.sqrt(n_layer)


class Architecture(Facts):
    """What llama.cpp does with one architecture. The defaults are what it does with most."""

    told_by_depth: frozenset[int] | Literal["any"] = frozenset()
    input_factor: Literal["none", "root of the width"] = "none"
    takes_states: Literal["always", "with sections"] = "always"
    least_layers: int = Field(default=1, ge=1)
    by_depth: ByDepth | None = None

    def is_told_by(self, n_layer: int) -> bool:
        """Whether a model of so many layers may be another one than its layers say."""
        return self.told_by_depth == "any" or n_layer in self.told_by_depth

    def factor(self, n_embd: int) -> float:
        """What any input is multiplied with."""
        return math.sqrt(n_embd) if self.input_factor == "root of the width" else 1.0


class SliceFacts(Facts):
    """The file. Keys are named without the `<arch>.` before them."""

    by_layer: frozenset[str]
    whole: frozenset[str]
    ties: dict[str, int]
    leading: frozenset[str]
    positional: frozenset[str]
    architectures: dict[str, Architecture]

    def of(self, arch: str) -> Architecture:
        """What is known of an architecture."""
        return self.architectures.get(arch, Architecture())

    @property
    def not_to_override(self) -> frozenset[str]:
        """Keys of which an override says something of the whole."""
        return self.positional | self.leading | self.ties.keys()


@functools.cache
def facts() -> SliceFacts:
    """The shipped file."""
    return load_yaml(SliceFacts, configs_dir() / "slices.yaml")
