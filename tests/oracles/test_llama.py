"""llama, Mistral and Mixtral against transformers, and every feature of the tiny models shown to bite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from diffharness.reference.archs.llama import Llama
from diffharness.reference.ops import NO_SCALING
from diffharness.weights.source import Overlay
from tests.oracles import agree
from tests.oracles.conftest import Tiny

LLAMAS = [
    "llama",
    "llama-square",
    "llama-llama3",
    "llama-linear",
    "llama-yarn",
    "llama-biases",
    "mistral",
    "mistral-window",
    "mixtral",
]
MakeTiny = Callable[..., Tiny]


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("case", LLAMAS)
def test_float32_logits_agree(make_tiny: MakeTiny, case: str, wide: bool) -> None:
    made = make_tiny(case, wide)
    ours = agree.reference_logits(made.checkpoint, made.ids)
    assert agree.nmse(ours, agree.oracle_logits(made.model, made.ids)) <= agree.FLOAT32


@pytest.mark.parametrize("case", LLAMAS)
def test_float64_logits_agree(make_tiny: MakeTiny, case: str) -> None:
    made = make_tiny(case)
    ours = agree.reference_logits(made.checkpoint, made.ids, dtype="float64")
    assert ours.dtype == torch.float64
    assert agree.nmse(ours, agree.oracle_logits(made.model, made.ids, torch.float64)) <= agree.FLOAT64


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_every_layers_residual_agrees(make_tiny: MakeTiny, case: str) -> None:
    made = make_tiny(case)
    streams = agree.oracle_streams(made.model, made.ids)
    taps = agree.reference_taps(made.checkpoint, made.ids)
    n_layer = len(streams) - 1
    names = ["token_embd", *(f"blk.{il}.layer_out" for il in range(n_layer - 1)), "output_norm"]
    for name, stream in zip(names, streams, strict=True):
        assert agree.nmse(taps[name], stream) <= agree.FLOAT32, name


def without_scaling(model: Llama) -> Llama:
    return replace(model, rope_scaling=NO_SCALING)


def scaled(**changes: float) -> Callable[[Llama], Llama]:
    return lambda model: replace(model, rope_scaling=replace(model.rope_scaling, **changes))


FEATURES: list[tuple[str, str, Callable[[Llama], Llama]]] = [
    ("llama", "epsilon", lambda m: replace(m, eps=1e-6)),
    ("llama", "rope base", lambda m: replace(m, rope_base=1e4)),
    ("llama", "attention scale", lambda m: replace(m, attn_scale=1.1 * m.attn_scale)),
    ("llama-linear", "linear scaling", without_scaling),
    ("llama-yarn", "yarn", without_scaling),
    ("llama-yarn", "yarn's factor on sine and cosine", scaled(magnitude=1.0)),
    ("llama-yarn", "yarn's mix", scaled(ext_factor=0.0)),
    ("mistral-window", "window", lambda m: replace(m, window=(None,) * m.n_layer)),
    ("mistral-window", "window by one", lambda m: replace(m, window=(25,) * m.n_layer)),
    ("mixtral", "experts used", lambda m: replace(m, n_expert_used=1)),
    ("mixtral", "normalised experts", lambda m: replace(m, normalise_experts=False)),
]


@pytest.mark.parametrize(("case", "feature", "broken"), FEATURES, ids=[f"{case}: {what}" for case, what, _ in FEATURES])
def test_features_bite(make_tiny: MakeTiny, case: str, feature: str, broken: Callable[[Llama], Llama]) -> None:
    made = make_tiny(case)
    model = broken(Llama.from_metadata(made.checkpoint.metadata))
    wrong = agree.reference_logits(made.checkpoint, made.ids, model=model)
    assert agree.nmse(wrong, agree.oracle_logits(made.model, made.ids)) > 1e-5


class Without(Overlay):
    """A source that lacks some tensors."""

    def __init__(self, base: object, lacks: Callable[[str], bool]) -> None:
        super().__init__(base)  # type: ignore[arg-type]
        self.tensors = {name: info for name, info in self.tensors.items() if not lacks(name)}


@pytest.mark.parametrize(
    ("case", "lacks"),
    [("llama-llama3", "rope_freqs.weight"), ("llama-biases", ".bias"), ("llama-biases", "attn_output.bias")],
)
def test_optional_tensors_bite(make_tiny: MakeTiny, case: str, lacks: str) -> None:
    made = make_tiny(case)
    source = Without(made.checkpoint, lambda name: name.endswith(lacks))
    assert len(source.tensors) < len(made.checkpoint.tensors)
    wrong = agree.reference_logits(source, made.ids)
    assert agree.nmse(wrong, agree.oracle_logits(made.model, made.ids)) > 1e-3
