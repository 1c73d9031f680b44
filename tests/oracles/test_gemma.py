"""Gemma 2, 3 and 4 against transformers, every form, and every feature of the tiny models shown to bite."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from diffharness.reference import archs
from diffharness.reference.archs.gemma2 import Gemma2
from diffharness.reference.archs.gemma3 import Gemma3
from diffharness.reference.archs.gemma4 import Gemma4
from diffharness.reference.model import GGML, State
from diffharness.reference.ops import NO_SCALING
from diffharness.reference.runner import Reference
from diffharness.reference.steps import Steps
from diffharness.reference.weights import SourceWeights
from diffharness.weights.names import for_arch
from diffharness.weights.source import Float32Array, IntArray, TensorInfo, WeightSource
from tests.oracles import agree, tiny_gemma
from tests.oracles.conftest import Tiny

MakeTiny = Callable[..., Tiny]
SMALL_GEMMA4 = ["gemma4", "gemma4-experts", "gemma4-e"]


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("case", tiny_gemma.CASES)
def test_float32_logits_agree(make_tiny: MakeTiny, case: str, wide: bool) -> None:
    made = make_tiny(case, wide)
    ours = agree.reference_logits(made.checkpoint, made.ids)
    assert agree.nmse(ours, agree.oracle_logits(made.model, made.ids)) <= agree.FLOAT32
    assert made.checkpoint.extra == []


@pytest.mark.parametrize("case", ["gemma2", "gemma3", *SMALL_GEMMA4])
def test_every_layers_residual_agrees(make_tiny: MakeTiny, case: str) -> None:
    made = make_tiny(case)
    streams = agree.oracle_streams(made.model, made.ids)
    taps = agree.reference_taps(made.checkpoint, made.ids)
    names = ["token_embd", *(f"blk.{il}.layer_out" for il in range(len(streams) - 2)), "output_norm"]
    for name, stream in zip(names, streams, strict=True):
        assert agree.nmse(taps[name], stream) <= agree.FLOAT32, name


@pytest.mark.parametrize("case", ["gemma2", "gemma3", *SMALL_GEMMA4])
def test_config_written_back_gives_the_same_model(make_tiny: MakeTiny, tmp_path: Path, case: str) -> None:
    made = make_tiny(case)
    metadata = made.checkpoint.metadata
    # A file's metadata lack our own keys, and its floats are float32.
    stored = {
        key: float(np.float32(value)) if isinstance(value, float) else value
        for key, value in metadata.items()
        if not key.startswith("diffharness.")
    }
    config = for_arch(str(metadata["general.architecture"])).config(stored)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(made.folder / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert agree.nmse(agree.oracle_logits(again, made.ids), agree.oracle_logits(made.model, made.ids)) <= 1e-12


# -- every feature bites --------------------------------------------------------------------------------


def gemma3(change: Callable[[Gemma3], Gemma3]) -> Callable[[Steps], Steps]:
    def changed(model: Steps) -> Steps:
        assert isinstance(model, Gemma3)
        return change(model)

    return changed


def gemma4(change: Callable[[Gemma4], Gemma4]) -> Callable[[Steps], Steps]:
    def changed(model: Steps) -> Steps:
        assert isinstance(model, Gemma4)
        return change(model)

    return changed


def of_class(kind: type[Gemma3]) -> Callable[[Steps], Steps]:
    return lambda model: kind(**vars(model))


MODEL_FEATURES: list[tuple[str, str, Callable[[Steps], Steps]]] = [
    ("gemma2", "window", gemma3(lambda m: replace(m, window=(None,) * m.n_layer))),
    ("gemma2", "which layers slide", gemma3(lambda m: replace(m, window=m.window[1:] + m.window[:1]))),
    ("gemma2", "cap of scores", gemma3(lambda m: replace(m, attn_softcap=None))),
    ("gemma2", "cap of logits", gemma3(lambda m: replace(m, softcap=None))),
    ("gemma2-scale", "scale of scores", gemma3(lambda m: replace(m, attn_scale=32**-0.5))),
    ("gemma3", "window", gemma3(lambda m: replace(m, window=(None,) * m.n_layer))),
    ("gemma3", "head norms", of_class(Gemma2)),
    ("gemma3", "rope base of sliding layers", gemma3(lambda m: replace(m, sliding_rope_base=m.rope_base))),
    ("gemma3", "rope base of globals", gemma3(lambda m: replace(m, rope_base=m.sliding_rope_base))),
    ("gemma3", "linear scaling", gemma3(lambda m: replace(m, rope_scaling=NO_SCALING))),
    ("gemma3", "linear scaling of globals only", gemma3(lambda m: replace(m, sliding_rope_scaling=m.rope_scaling))),
    ("gemma3-pattern", "which layers slide", gemma3(lambda m: replace(m, window=m.window[1:] + m.window[:1]))),
    ("gemma3-pattern", "cap of logits", gemma3(lambda m: replace(m, softcap=None))),
    ("gemma3-scale", "scale of scores", gemma3(lambda m: replace(m, attn_scale=32**-0.5))),
    ("gemma4", "window", gemma4(lambda m: replace(m, window=tuple(size and 1000 for size in m.window)))),
    ("gemma4", "rope base of sliding layers", gemma4(lambda m: replace(m, sliding_rope_base=1e6))),
    ("gemma4", "rope base of globals", gemma4(lambda m: replace(m, rope_base=1e4))),
    ("gemma4", "cap of logits", gemma4(lambda m: replace(m, softcap=None))),
    ("gemma4-rotary-share", "no cap of logits", gemma4(lambda m: replace(m, softcap=4.0))),
    ("gemma4-experts", "experts used", gemma4(lambda m: replace(m, n_expert_used=1))),
]


@pytest.mark.parametrize(
    ("case", "feature", "broken"), MODEL_FEATURES, ids=[f"{case}: {what}" for case, what, _ in MODEL_FEATURES]
)
def test_features_bite(make_tiny: MakeTiny, case: str, feature: str, broken: Callable[[Steps], Steps]) -> None:
    made = make_tiny(case)
    model = broken(archs.build(made.checkpoint.metadata))
    wrong = agree.reference_logits(made.checkpoint, made.ids, model=model)
    assert agree.nmse(wrong, agree.oracle_logits(made.model, made.ids)) > 1e-5


class Changed:
    """A source whose tensors go through `change`; a tensor changed to None is not there."""

    def __init__(self, base: WeightSource, change: Callable[[str, Float32Array], Float32Array | None]) -> None:
        self.label, self.arch, self.metadata = base.label, base.arch, base.metadata
        changed = {name: change(name, base.read(name)) for name in base.tensors}
        self.values = {name: value for name, value in changed.items() if value is not None}

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, value.shape, "F32", value.nbytes) for name, value in self.values.items()}

    def read(self, name: str) -> Float32Array:
        return self.values[name]

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self.values[name][rows]


TENSOR_FEATURES = [
    ("gemma4", "layer_output_scale"),
    ("gemma4", "rope_freqs"),
    ("gemma4", "attn_q_norm"),
    ("gemma4", "post_attention_norm"),
    ("gemma4", "post_ffw_norm"),
    ("gemma4-experts", "ffn_gate_inp.scale"),
    ("gemma4-experts", "ffn_down_exps.scale"),
    ("gemma4-experts", "pre_ffw_norm_2"),
    ("gemma4-experts", "post_ffw_norm_1"),
    ("gemma4-experts", "post_ffw_norm_2"),
    ("gemma4-e", "per_layer_proj_norm"),
    ("gemma4-e", "post_norm"),
]


@pytest.mark.parametrize(("case", "tensor"), TENSOR_FEATURES)
def test_gains_bite(make_tiny: MakeTiny, case: str, tensor: str) -> None:
    """Norms, scales and scalars that were all 1 would make another model."""
    made = make_tiny(case)
    source = Changed(made.checkpoint, lambda name, value: np.ones_like(value) if tensor in name else value)
    wrong = agree.reference_logits(source, made.ids)
    assert agree.nmse(wrong, agree.oracle_logits(made.model, made.ids)) > 1e-5


@pytest.mark.parametrize("tensor", ["per_layer_token_embd", "per_layer_model_proj", "inp_gate"])
def test_both_parts_of_the_per_layer_embedding_bite(make_tiny: MakeTiny, tensor: str) -> None:
    made = make_tiny("gemma4-e")
    source = Changed(made.checkpoint, lambda name, value: value * 0 if tensor in name else value)
    wrong = agree.reference_logits(source, made.ids)
    assert agree.nmse(wrong, agree.oracle_logits(made.model, made.ids)) > 1e-4


# -- Gemma 4: what a file may hold ----------------------------------------------------------------------


def test_separate_and_fused_experts_are_one_model(make_tiny: MakeTiny) -> None:
    made = make_tiny("gemma4-experts")
    checkpoint = made.checkpoint
    halves: dict[str, Float32Array] = {}
    for name in checkpoint.tensors:
        if name.endswith("ffn_gate_up_exps.weight"):
            both = checkpoint.read(name)
            n_ff = both.shape[1] // 2
            halves[name.replace("gate_up", "gate")] = both[:, :n_ff]
            halves[name.replace("gate_up", "up")] = both[:, n_ff:]
    assert len(halves) == 2 * 3
    source = Changed(checkpoint, lambda name, value: None if "gate_up_exps" in name else value)
    source.values |= halves
    apart = agree.reference_logits(source, made.ids)
    assert agree.nmse(apart, agree.oracle_logits(made.model, made.ids)) <= agree.FLOAT32


def test_unused_keys_and_values_of_borrowing_layers_change_nothing(make_tiny: MakeTiny) -> None:
    """Checkpoints may carry projections for layers that attend to another layer's keys."""
    made = make_tiny("gemma4-e")
    source = Changed(made.checkpoint, lambda name, value: value)
    before = agree.reference_logits(source, made.ids)
    for name in ("attn_k", "attn_v", "attn_k_norm"):
        source.values[f"blk.5.{name}.weight"] = source.values[f"blk.2.{name}.weight"] * 3
    assert torch.equal(agree.reference_logits(source, made.ids), before)


def test_borrowing_layers_take_the_last_of_their_kind(make_tiny: MakeTiny) -> None:
    taps = agree.reference_taps(make_tiny("gemma4-e").checkpoint, make_tiny("gemma4-e").ids)
    assert {name for name in taps if ".attn_k" in name} == {
        f"blk.{il}.{tap}" for il in range(3) for tap in ("attn_k", "attn_k_norm", "attn_k_rope")
    }
    model = archs.build(make_tiny("gemma4-e").checkpoint.metadata)
    assert isinstance(model, Gemma4)
    assert [model.layer_kind(il) for il in range(6)] == ["sliding", "sliding", "global"] * 2
    assert [model.lender(il) for il in range(6)] == [0, 1, 2, 1, 1, 2]


def test_value_of_a_global_layer_is_its_raw_key(make_tiny: MakeTiny) -> None:
    made = make_tiny("gemma4")
    taps = agree.reference_taps(made.checkpoint, made.ids)
    assert torch.equal(taps["blk.2.attn_v"], taps["blk.2.attn_k"])
    assert not torch.equal(taps["blk.1.attn_v"], taps["blk.1.attn_k"])
    heads = taps["blk.2.attn_v_norm"].reshape(len(made.ids), 1, -1)
    torch.testing.assert_close(heads.square().mean(-1), torch.ones(len(made.ids), 1), atol=0.2, rtol=0)


def test_damage_to_a_layer_scalar_shows_in_that_layers_output_first(make_tiny: MakeTiny) -> None:
    made = make_tiny("gemma4")
    source = Changed(
        made.checkpoint, lambda name, value: value * 2 if name == "blk.3.layer_output_scale.weight" else value
    )
    sound, damaged = agree.reference_taps(made.checkpoint, made.ids), agree.reference_taps(source, made.ids)
    assert next(name for name in sound if not torch.equal(sound[name], damaged[name])) == "blk.3.layer_out"


# -- what other parts rely on -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gemma2", "gemma3", *SMALL_GEMMA4])
def test_gelu_convention_is_small_and_not_nothing(make_tiny: MakeTiny, case: str) -> None:
    made = make_tiny(case)
    assert archs.build(made.checkpoint.metadata).uses_gelu
    defined = agree.reference_logits(made.checkpoint, made.ids)
    as_ggml = agree.reference_logits(made.checkpoint, made.ids, arithmetic=GGML)
    assert 0 < agree.nmse(as_ggml, defined) < 1e-5


@pytest.mark.parametrize("case", ["gemma2", "gemma3", *SMALL_GEMMA4])
def test_chunks_of_a_batch_do_not_see_one_another(make_tiny: MakeTiny, case: str) -> None:
    made = make_tiny(case)
    ids = made.ids.numpy()
    both = Reference(made.checkpoint).run([ids, ids[::-1].copy()])
    alone = agree.reference_logits(made.checkpoint, made.ids)
    assert both is not None
    assert agree.nmse(both[: len(ids)], alone) <= 1e-11


@pytest.mark.parametrize("case", SMALL_GEMMA4)
def test_gradients_reach_every_weight(make_tiny: MakeTiny, case: str) -> None:
    made = make_tiny(case)

    class Leaves(SourceWeights):
        def __init__(self, source: WeightSource) -> None:
            super().__init__(source)
            self.leaves = {name: torch.from_numpy(source.read(name)).requires_grad_() for name in source.tensors}

        def get(self, name: str) -> torch.Tensor:
            return self.leaves[name]

        def rows(self, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
            return self.leaves[name][rows]

    weights, state = Leaves(made.checkpoint), State(torch.arange(24))
    model = archs.build(made.checkpoint.metadata)
    x = model.embed(weights, made.ids[None, :24], state, lambda name, value: None)
    for il in range(model.n_layer):
        x = model.layer(weights, il, x, state, lambda name, value: None)
    model.head(weights, x, state, lambda name, value: None).square().mean().backward()
    still = [name for name, leaf in weights.leaves.items() if leaf.grad is None or not leaf.grad.isfinite().all()]
    assert still == ["rope_freqs.weight"] or still == []


def old_gemma3(folder: Path, target: Path) -> dict[str, Any]:
    """A folder's config.json as it was before transformers 5, rope and pattern in flat keys."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    ropes = config.pop("rope_parameters")
    del config["layer_types"]
    config |= {
        "rope_theta": ropes[tiny_gemma.GLOBAL]["rope_theta"],
        "rope_local_base_freq": ropes[tiny_gemma.SLIDING]["rope_theta"],
        "rope_scaling": {"rope_type": "linear", "factor": ropes[tiny_gemma.GLOBAL]["factor"]},
        "sliding_window_pattern": 6,
    }
    (target / "config.json").write_text(json.dumps(config))
    return config


def test_old_config_of_gemma3_is_the_same_model(make_tiny: MakeTiny, tmp_path: Path) -> None:
    made = make_tiny("gemma3")
    config = old_gemma3(made.folder, tmp_path)
    assert for_arch("gemma3").metadata(config) == made.checkpoint.metadata
