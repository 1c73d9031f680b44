"""Nothing of a synthetic model is there for show: every tensor and key that the reference reads moves the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from diffharness.errors import DiffharnessError
from diffharness.reference import archs
from diffharness.reference.runner import Reference
from diffharness.taps import split
from diffharness.weights.names import MAPS
from diffharness.weights.source import Float32Array, IntArray, Overlay
from diffharness.weights.synth import SynthSource
from tests.oracles import agree
from tests.oracles.cases import CASES

N_TOKENS = 60
LEAST = 1e-9  # NMSE of the logits; float32 alone moves them by less than 1e-11

# Keys that the reference reads and that need not matter, by the last part of their names.
SILENT_KEYS = {
    "context_length",  # of scaling, where that does not state one
    # sizes and numbers that the tensors tell too; they are held against the shapes before a run
    "vocab_size",
    "embedding_length",
    "feed_forward_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_shared_count",
    "leading_dense_block_count",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.value_length_mla",
    "attention.q_lora_rank",
    "shortconv.l_cache",
    "ssm.inner_size",
    # of images: a text's tokens have one position in all sections, and no image's features to add
    "rope.dimension_sections",
    "n_deepstack_layers",
    # what the list of layers says more fully
    "full_attention_interval",
}

# Single ones, and why.
SILENT: dict[str, str] = {
    "deepseek2.rope.scaling.yarn_beta_fast": "no pair of so few turns that often",
    "granitehybrid.rope.dimension_count": "its attention layers have no positions",
    "granitehybrid.rope.freq_base": "its attention layers have no positions",
    "nemotron_h.rope.freq_base": "its attention layers have no positions",
    "nemotron_h_moe.rope.freq_base": "its attention layers have no positions",
    "nemotron_h.attention.layer_norm_epsilon": "its norms have the other one",
    "nemotron_h_moe.attention.layer_norm_epsilon": "its norms have the other one",
    "jamba.rope.freq_base": "its attention layers have no positions",
    "kimi-linear.rope.freq_base": "its attention layers have no positions",
    "minicpm3.attention.layer_norm_rms_epsilon": "too small in the example to be seen",
    "hunyuan-dense.rope.scaling.factor": "of no scaling",
    "hunyuan-moe.rope.scaling.factor": "of no scaling",
    "minicpm.rope.scaling.type": "the factors are tensors",
    "mpt.diffharness.activation": "GELU's two forms are nearly the same",
    "phimoe.rope.scaling.original_context_length": "longer than the text either way",
    "stablelm.use_parallel_residual": "the tensors tell",
}

# Of long and short factors of the rope a text uses one kind.
SILENT_TENSORS = {"rope_factors_short.weight", "rope_factors_long.weight"}


class Scaled(Overlay):
    """A source in which one tensor is larger."""

    def __init__(self, base: Any, name: str) -> None:
        super().__init__(base)
        self._name = name

    def read(self, name: str) -> Float32Array:
        return self._changed(name, super().read(name))

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self._changed(name, super().take(name, rows))

    def _changed(self, name: str, values: Float32Array) -> Float32Array:
        # Unevenly, so that a norm that follows does not undo it.
        return values * np.linspace(1.1, 1.6, values.shape[-1], dtype=np.float32) if name == self._name else values


def logits(source: Any) -> torch.Tensor:
    ids = np.random.default_rng(5).integers(0, source.tensors["token_embd.weight"].shape[0], N_TOKENS)
    out = Reference(source).run([ids])
    assert out is not None
    return out


def representatives(source: SynthSource) -> Iterator[str]:
    """Tensors outside of layers, and of every kind of layer and tensor the first."""
    model, seen = archs.build(source.metadata), set[tuple[str, str]]()
    for name in source.tensors:
        il, stem = split(name)
        key = ("", name) if il is None or il >= model.n_layer else (model.layer_kind(il), stem)
        if key not in seen:
            seen.add(key)
            yield name


@pytest.mark.parametrize("arch", MAPS)
def test_every_tensor_matters(arch: str) -> None:
    source = SynthSource(arch, CASES[arch].sizes)
    clean = logits(source)
    heard = [name for name in representatives(source) if name not in SILENT_TENSORS]
    silent = [name for name in heard if agree.nmse(logits(Scaled(source, name)), clean) < LEAST]
    assert not silent


@pytest.mark.parametrize("arch", MAPS)
def test_every_key_matters(arch: str) -> None:
    source = SynthSource(arch, CASES[arch].sizes)
    asked = archs.Asked(source.metadata)
    archs.BUILD[arch](asked)
    clean = logits(source)
    silent = []
    for key in sorted(asked.keys_asked & source.metadata.keys()):
        name = key.removeprefix(arch + ".")
        if key.startswith("general.") or name in SILENT_KEYS or f"{arch}.{name}" in SILENT:
            continue
        others = _others(source.metadata[key])
        if others and all(_is_silent(source, key, value, clean) for value in others):
            silent.append(key)
    assert not silent


def _is_silent(source: SynthSource, key: str, value: object, clean: torch.Tensor) -> bool:
    changed = Overlay(source, metadata={**source.metadata, key: value})
    try:
        return agree.nmse(logits(changed), clean) < LEAST
    except (DiffharnessError, RuntimeError, ValueError, IndexError, KeyError):
        return False  # it makes another model, or none


def _others(value: object) -> list[object]:
    """Other values of the same kind."""
    if isinstance(value, (list, tuple)):
        return [[_others(one)[0] for one in value], list(reversed(value))]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(0, value - 1), 2 * value]
    if isinstance(value, float):
        return [1.5 * value + (value == 0.0), 0.5 * value, *([1e3 * value] if 0 < value < 1e-3 else [])]
    return [] if value == "none" else ["none"]
