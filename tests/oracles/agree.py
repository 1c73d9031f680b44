"""Comparing transformers' forward of a tiny model with the reference's on its checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import torch

from diffharness.reference.model import DEFINITION, Arithmetic
from diffharness.reference.runner import Reference
from diffharness.reference.steps import Steps
from diffharness.weights.source import WeightSource

FLOAT32 = 1e-10  # logits NMSE that two float32 forwards of one definition stay below
FLOAT64 = 1e-11  # in float64; transformers makes its rotary tables in float32 also then


def oracle_logits(model: Any, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """transformers' logits [tokens, vocab]."""
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    with torch.inference_mode():
        logits: torch.Tensor = model(ids[None]).logits[0]
    return logits


def oracle_streams(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The input of every layer [tokens, width], the embedding first; then the final norm's output."""
    with torch.inference_mode():
        states = model(ids[None], output_hidden_states=True).hidden_states
    return [state[0] for state in states]


def reference_logits(
    source: WeightSource,
    ids: torch.Tensor,
    *,
    dtype: str = "float32",
    arithmetic: Arithmetic = DEFINITION,
    model: Steps | None = None,
) -> torch.Tensor:
    """The reference's logits [tokens, vocab]."""
    logits = Reference(source, dtype=dtype, arithmetic=arithmetic, model=model).run([ids.numpy()])
    assert logits is not None
    return logits


def reference_taps(source: WeightSource, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every tap of the reference by full name, [tokens, width]."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, own: torch.Tensor, local: torch.Tensor | None, rows: slice) -> None:
        assert local is None and rows == slice(0, len(ids))
        found[name] = own.clone()

    Reference(source).run([ids.numpy()], on_tap=keep)
    return found


def nmse(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Σ(a - b)² / Σb² in float64."""
    a, b = value.double(), reference.double()
    return float((a - b).square().sum() / b.square().sum())
