"""Small files and sources for the tests of `weights`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from diffharness.weights import names
from diffharness.weights.source import Float32Array, IntArray, TensorInfo

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MIXTRAL_CONFIG: dict[str, Any] = {
    **LLAMA_CONFIG,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


class MemorySource:
    """A `WeightSource` over arrays."""

    def __init__(self, arch: str, metadata: Mapping[str, Any], arrays: Mapping[str, Float32Array]) -> None:
        self.label, self.arch, self.metadata, self.arrays = "memory", arch, metadata, arrays
        self.tensors = {n: TensorInfo(n, a.shape, "F32", a.nbytes) for n, a in arrays.items()}

    def read(self, name: str) -> Float32Array:
        return self.arrays[name]

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self.arrays[name][rows]


def write_tiny(path: Path, change: Callable[[gguf.GGUFWriter], None] = lambda writer: None) -> Path:
    """A GGUF written by gguf-py, with a KV of every kind and tensors of several types."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_uint8("test.u8", 7)
    writer.add_int8("test.i8", -7)
    writer.add_uint16("test.u16", 700)
    writer.add_int16("test.i16", -700)
    writer.add_int32("test.i32", -70000)
    writer.add_uint64("test.u64", 1 << 40)
    writer.add_int64("test.i64", -(1 << 40))
    writer.add_float64("test.f64", 0.1)
    writer.add_string("general.name", "tiny ▁ model")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "▁c", "dé"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, -2.0, 0.0])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3, 4])
    writer.add_array("test.flags", [True, False, True])
    change(writer)
    for name, shape, type_name in (
        ("token_embd.weight", (4, 256), "Q8_0"),
        ("blk.0.attn_q.weight", (8, 64), "Q4_0"),
        ("blk.0.attn_norm.weight", (64,), "F32"),
        ("blk.0.ffn_down_exps.weight", (3, 5, 32), "F16"),
    ):
        values = rng.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType[type_name]
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_source(config: Mapping[str, Any]) -> MemorySource:
    """Random weights for a config.json, in GGUF's terms; optional tensors left out."""
    arch_map = names.for_config(config)
    metadata = {"general.architecture": arch_map.arch, **arch_map.metadata(config)}
    rng = np.random.default_rng(5)
    arrays = {
        rule.name: (rng.standard_normal(rule.shape) / 8).astype(np.float32)
        for rule in arch_map.rules(metadata)
        if rule.required or rule.name == "output.weight"
    }
    return MemorySource(arch_map.arch, metadata, arrays)
