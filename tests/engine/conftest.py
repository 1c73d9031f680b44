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
from diffharness.weights.source import Float32Array, IntArray, TensorInfo

N_VOCAB, N_EMBD, N_FF, N_HEAD, N_KV, HEAD = 96, 64, 96, 4, 2, 16
N_LAYER = 2


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


def tiny(arch: str = "llama", *, extra: Mapping[str, Any] | None = None, shapes: Mapping[str, Any] | None = None) -> InMemory:
    """Two random layers; `shapes` adds tensors (`blk.N.x` for every layer) or, with None, removes them."""
    rng = np.random.default_rng(7)
    per_layer: dict[str, tuple[int, ...] | None] = {
        "attn_norm.weight": (N_EMBD,),
        "attn_q.weight": (N_HEAD * HEAD, N_EMBD),
        "attn_k.weight": (N_KV * HEAD, N_EMBD),
        "attn_v.weight": (N_KV * HEAD, N_EMBD),
        "attn_output.weight": (N_EMBD, N_HEAD * HEAD),
        "ffn_norm.weight": (N_EMBD,),
        "ffn_gate.weight": (N_FF, N_EMBD),
        "ffn_up.weight": (N_FF, N_EMBD),
        "ffn_down.weight": (N_EMBD, N_FF),
        **(shapes or {}),
    }
    all_shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (N_VOCAB, N_EMBD), "output_norm.weight": (N_EMBD,)}
    for il in range(N_LAYER):
        all_shapes |= {f"blk.{il}.{name}": shape for name, shape in per_layer.items() if shape is not None}
    arrays = {}
    for name, shape in all_shapes.items():
        values = rng.standard_normal(shape) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        arrays[name] = (values + (1.0 if name.endswith("norm.weight") else 0.0)).astype(np.float32)
    metadata = {
        "general.architecture": arch,
        f"{arch}.vocab_size": N_VOCAB,
        f"{arch}.context_length": 4096,
        f"{arch}.embedding_length": N_EMBD,
        f"{arch}.block_count": N_LAYER,
        f"{arch}.feed_forward_length": N_FF,
        f"{arch}.attention.head_count": N_HEAD,
        f"{arch}.attention.head_count_kv": N_KV,
        f"{arch}.attention.key_length": HEAD,
        f"{arch}.attention.value_length": HEAD,
        f"{arch}.rope.dimension_count": HEAD,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "no_vocab",
        **{key.replace("ARCH", arch): value for key, value in (extra or {}).items()},
    }
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
