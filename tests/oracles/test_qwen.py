"""Qwen 2, Qwen 3 and Qwen 3 MoE against transformers, and every feature of the tiny models shown to bite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from diffharness.reference import archs
from diffharness.reference.archs.llama import Llama
from diffharness.reference.archs.qwen2 import Qwen2
from diffharness.reference.archs.qwen3 import Qwen3
from diffharness.reference.ops import NO_SCALING
from tests.oracles import agree
from tests.oracles.conftest import Tiny

QWENS = [
    "qwen2",
    "qwen2-yarn",
    "qwen2-window",
    "qwen3",
    "qwen3-yarn",
    "qwen3-yarn-stated",
    "qwen3-biases",
    "qwen3moe",
    "qwen3moe-unnormalised",
]
MakeTiny = Callable[..., Tiny]


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("case", QWENS)
def test_float32_logits_agree(make_tiny: MakeTiny, case: str, wide: bool) -> None:
    made = make_tiny(case, wide)
    ours = agree.reference_logits(made.checkpoint, made.ids)
    assert agree.nmse(ours, agree.oracle_logits(made.model, made.ids)) <= agree.FLOAT32


@pytest.mark.parametrize("case", QWENS)
def test_float64_logits_agree(make_tiny: MakeTiny, case: str) -> None:
    made = make_tiny(case)
    ours = agree.reference_logits(made.checkpoint, made.ids, dtype="float64")
    assert agree.nmse(ours, agree.oracle_logits(made.model, made.ids, torch.float64)) <= agree.FLOAT64


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "qwen3moe"])
def test_every_layers_residual_agrees(make_tiny: MakeTiny, case: str) -> None:
    made = make_tiny(case)
    streams = agree.oracle_streams(made.model, made.ids)
    taps = agree.reference_taps(made.checkpoint, made.ids)
    names = ["token_embd", *(f"blk.{il}.layer_out" for il in range(len(streams) - 2)), "output_norm"]
    for name, stream in zip(names, streams, strict=True):
        assert agree.nmse(taps[name], stream) <= agree.FLOAT32, name


class InterleavedQwen3(Qwen3):
    interleaved = True


def as_(kind: type[Llama]) -> Callable[[Llama], Llama]:
    """The same hyperparameters under another architecture's forward."""
    return lambda model: kind(**{field.name: getattr(model, field.name) for field in fields(model)})


FEATURES: list[tuple[str, str, Callable[[Llama], Llama]]] = [
    ("qwen2-window", "window", lambda m: replace(m, window=(None,) * m.n_layer)),
    ("qwen2-window", "which layers slide", lambda m: replace(m, window=(16,) * m.n_layer)),
    ("qwen2-yarn", "yarn", lambda m: replace(m, rope_scaling=NO_SCALING)),
    ("qwen3", "head norms", as_(Qwen2)),
    ("qwen3", "order of rotary pairs", as_(InterleavedQwen3)),
    ("qwen3-yarn-stated", "stated factor", lambda m: replace(m, rope_scaling=replace(m.rope_scaling, magnitude=1.1))),
    ("qwen3-yarn-stated", "beta_fast", lambda m: replace(m, rope_scaling=replace(m.rope_scaling, beta_fast=32.0))),
    ("qwen3-yarn-stated", "beta_slow", lambda m: replace(m, rope_scaling=replace(m.rope_scaling, beta_slow=1.0))),
    ("qwen3moe", "experts used", lambda m: replace(m, n_expert_used=2)),
    ("qwen3moe-unnormalised", "unnormalised experts", lambda m: replace(m, normalise_experts=True)),
]


@pytest.mark.parametrize(("case", "feature", "broken"), FEATURES, ids=[f"{case}: {what}" for case, what, _ in FEATURES])
def test_features_bite(make_tiny: MakeTiny, case: str, feature: str, broken: Callable[[Llama], Llama]) -> None:
    made = make_tiny(case)
    model = archs.build(made.checkpoint.metadata)
    assert isinstance(model, Llama)
    wrong = agree.reference_logits(made.checkpoint, made.ids, model=broken(model))
    assert agree.nmse(wrong, agree.oracle_logits(made.model, made.ids)) > 1e-5
