"""Small GGUFs of random values in the types that damage has to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness.damage import Damage, Options, apply
from diffharness.engine.quantizer import Quantizer
from diffharness.settings import load_engine
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import RawTensor, encode_floats, write_tensors
from diffharness.weights.source import Float32Array

WIDTH, N_LAYER, N_EXPERT = 256, 6, 4
TYPES = {"attn_v": "Q6_K", "ffn_down": "Q4_0", "ffn_up": "F16", "ffn_up_exps": "Q8_0", "ffn_gate_exps": "Q8_0"}

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": N_LAYER,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.dimension_count": 32,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.attention.sliding_window": 64,
    "llama.final_logit_softcapping": 30.0,
    "llama.attn_logit_softcapping": 50.0,
    "llama.rope.freq_base_swa": 10000.0,
    "llama.expert_used_count": 2,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.tokens": ["a", "b"],
}
SHAPES: dict[str, tuple[int, ...]] = {
    "attn_norm.weight": (WIDTH,),
    "attn_q.weight": (WIDTH, WIDTH),
    "attn_k.weight": (64, WIDTH),
    "attn_v.weight": (64, WIDTH),
    "attn_output.weight": (WIDTH, WIDTH),
    "ffn_gate.weight": (512, WIDTH),
    "ffn_up.weight": (512, WIDTH),
    "ffn_down.weight": (WIDTH, 512),
    "ffn_gate_exps.weight": (N_EXPERT, 64, WIDTH),
    "ffn_up_exps.weight": (N_EXPERT, 64, WIDTH),
    "layer_output_scale.weight": (1,),
}


@pytest.fixture(scope="session")
def quantizer() -> Iterator[Quantizer]:
    with Quantizer(load_engine("native").changed(threads=1)) as made:
        yield made


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, quantizer: Quantizer) -> Path:
    """Matrices as Q4_K and what `TYPES` says, the rest F32."""
    rng, tensors = np.random.default_rng(0), []
    shapes = {"token_embd.weight": (64, WIDTH), "rope_freqs.weight": (16,), "output_norm.weight": (WIDTH,)}
    shapes |= {f"blk.{il}.{name}": shape for il in range(N_LAYER) for name, shape in SHAPES.items()}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        matrix = len(shape) > 1
        kind = TYPES.get(name.split(".")[-2], "Q4_K") if matrix else "F32"
        raw = quantizer.quantize(values.reshape(-1, shape[-1]), kind) if matrix else encode_floats(values, "F32")
        tensors.append(RawTensor(name, shape, kind, lambda raw=raw: [raw.reshape(-1)]))  # type: ignore[misc]
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_tensors(path, {key: encode_value(key, value) for key, value in METADATA.items()}, tensors)
    return path


@pytest.fixture
def damaged(model: Path, tmp_path: Path, quantizer: Quantizer) -> Callable[..., Damage]:
    """`damaged(*how, tensors=..., layers=..., strength=..., type=..., seed=..., ...)` of `model`."""

    def make(*how: str, seed: int = 0, out: str = "damaged.gguf", **more: Any) -> Damage:
        options = Options(**{key: more.pop(key) for key in ("tensors", "layers", "strength", "type") if key in more})
        return apply(model, tmp_path / out, how, seed=seed, options=options, quantize=quantizer.quantize, **more)

    return make


def values(path: Path) -> dict[str, Float32Array]:
    with open_gguf(path) as file:
        return {name: file.read(name) for name in file.tensors}


def raws(path: Path) -> dict[str, bytes]:
    with open_gguf(path) as file:
        return {name: bytes(file.raw(name)) for name in file.tensors}


def sqnr(clean: Float32Array, other: Float32Array) -> float:
    """Signal to noise in dB."""
    difference = np.square(other - clean, dtype=np.float64).sum()
    return 10 * float(np.log10(np.square(clean, dtype=np.float64).sum() / difference))
