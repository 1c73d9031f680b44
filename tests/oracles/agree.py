"""Comparing transformers' forward of a tiny model with the reference's on its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffharness.reference.model import Arithmetic
from diffharness.reference.runner import Reference
from diffharness.weights.source import WeightSource


def oracle_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """transformers' logits [tokens, vocab] in the model's dtype."""
    with torch.inference_mode():
        logits: torch.Tensor = model(ids[None]).logits[0]
    return logits


def oracle_layers(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The input of every layer [tokens, width]."""
    with torch.inference_mode():
        states = model(ids[None], output_hidden_states=True).hidden_states
    return [state[0] for state in states[:-1]]


def reference_logits(
    source: WeightSource, ids: torch.Tensor, *, dtype: str = "float32", arithmetic: Arithmetic | None = None
) -> torch.Tensor:
    more = {} if arithmetic is None else {"arithmetic": arithmetic}
    logits = Reference(source, dtype=dtype, **more).run([ids.numpy()])
    assert logits is not None
    return logits


def nmse(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Σ(a - b)² / Σb² in float64."""
    a, b = value.double(), reference.double()
    return float((a - b).square().sum() / b.square().sum())


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def ids_array(ids: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    return ids.numpy().astype(np.int64)
