"""Tiny random models as GGUF, made once per session, and engine settings that are quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness.settings import EngineSettings
from diffharness.weights.gguf_write import write_gguf
from diffharness.weights.names import MAPS
from diffharness.weights.source import Float32Array, IntArray, TensorInfo

N_VOCAB, N_LAYER = 96, 2
SIZES: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
GEMMA: dict[str, Any] = {
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_local_base_freq": 1000.0,
}


@dataclass(frozen=True)
class InMemory:
    """A WeightSource of arrays."""

    arch: str
    metadata: Mapping[str, Any]
    arrays: Mapping[str, Float32Array]
    label: str = "tiny"

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, array.shape, "F32", array.nbytes) for name, array in self.arrays.items()}

    def read(self, name: str) -> Float32Array:
        return self.arrays[name]

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self.arrays[name][rows]


# Of the tensors that a model may have, those that these models do have.
OPTIONAL = ("ffn_gate_up_exps.weight", "ffn_down_exps.scale", "layer_output_scale.weight")


def tiny(arch: str = "llama", **config: Any) -> InMemory:
    """Two random layers of an architecture, with every tensor that it must have; `config` is config.json's."""
    rng = np.random.default_rng(7)
    names = MAPS[arch]
    metadata = names.metadata({**SIZES, "model_type": names.model_types[0], **config})
    metadata |= {"general.architecture": arch, "tokenizer.ggml.model": "no_vocab", f"{arch}.vocab_size": N_VOCAB}
    arrays = {}
    for rule in names.rules(metadata):
        if rule.values is not None:
            arrays[rule.name] = rule.values()
        elif rule.required or rule.name.endswith(OPTIONAL):
            values = rng.standard_normal(rule.shape) * (0.1 if len(rule.shape) == 1 else rule.shape[-1] ** -0.5)
            around_one = "norm" in rule.name or "scale" in rule.name
            arrays[rule.name] = (values + (1.0 if around_one else 0.0)).astype(np.float32)
    return InMemory(arch, metadata, arrays)


MakeGguf = Callable[..., Path]


@pytest.fixture(scope="session")
def make_gguf(tmp_path_factory: pytest.TempPathFactory) -> MakeGguf:
    """`tiny`'s arguments to a GGUF file."""

    def make(*args: Any, **kwargs: Any) -> Path:
        path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
        write_gguf(path, tiny(*args, **kwargs), type_of=lambda info: "F32")
        return path

    return make


@pytest.fixture(scope="session")
def llama_gguf(make_gguf: MakeGguf) -> Path:
    return make_gguf()


@pytest.fixture
def quick() -> EngineSettings:
    return EngineSettings(threads=1, time_limit_s=120)


@pytest.fixture(scope="session")
def ids() -> list[int]:
    return [int(token) for token in np.random.default_rng(3).integers(0, N_VOCAB, 40)]
