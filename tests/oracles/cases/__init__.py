"""Synthetic models of every architecture, as it is and in its variants; a module of this package per family.

`CASES` names them: for every architecture the map's own example, under the architecture's name, and what the modules'
own `CASES` add. A module may also give an architecture's own example other floors, or say that the engine differs.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from diffharness.weights.names import MAPS
from diffharness.weights.names._map import Sizes

WIDE = Sizes(n_embd=256, n_ff=512, n_ff_expert=256, head_dim=64, n_vocab=320)  # every quantization type applies


@dataclass(frozen=True)
class Case:
    """One model: an architecture's example with some keys of config.json changed."""

    arch: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    local: float = 1e-8  # what every local tap stays below, against the strict engine
    why: str = ""  # the reason of a `local` above 1e-8
    engine_differs: str = ""  # what llama.cpp computes otherwise than the model's definition, if anything
    transformers: float = 1e-10  # NMSE of logits against transformers, float32
    seed: int = 0


def _cases() -> dict[str, Case]:
    found = {arch: Case(arch) for arch in MAPS}
    for module in pkgutil.iter_modules(__path__):
        found |= import_module(f"{__name__}.{module.name}").CASES
    return found


CASES: dict[str, Case] = _cases()
