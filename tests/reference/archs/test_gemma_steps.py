"""Steps that Gemma 3n and Gemma 4 share, which hypotheses replace: both models have them, and each matters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from diffharness.reference import archs
from diffharness.reference.hypotheses import altered
from diffharness.reference.runner import Reference
from diffharness.weights.synth import SynthSource
from tests.oracles.cases import CASES

IDS = [torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(0)).numpy()]
E_MODEL = {"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 3, "attention_k_eq_v": False}
STEPS: dict[str, Any] = {
    "own_embedding": lambda me, plain, w, blk, x, *told: torch.zeros_like(x),
    "norm_values": lambda me, plain, w, il, v: v,
    "keys_values": lambda me, plain, w, il, *rest: tuple(2 * x for x in plain(w, il, *rest)),
    "lender": lambda me, plain, il: plain(il) if plain(il) == il or me.window[il] is None else 0,
}


@functools.cache
def source(arch: str) -> SynthSource:
    return SynthSource(arch, CASES[arch].sizes, changes=E_MODEL if arch == "gemma4" else {})


def logits(arch: str, **steps: Any) -> Tensor:
    out = Reference(source(arch), model=altered(archs.build(source(arch).metadata), **steps)).run(IDS)
    assert out is not None
    return out


@pytest.mark.parametrize("arch", ["gemma3n", "gemma4"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_can_be_replaced_and_matters(arch: str, step: str) -> None:
    plain = logits(arch)
    assert torch.equal(logits(arch, **{step: lambda me, plain, *rest: plain(*rest)}), plain)
    assert not torch.allclose(logits(arch, **{step: STEPS[step]}), plain, atol=1e-3)
