"""A model of random weights in memory, for tests that need a `WeightSource` and no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffharness.weights import names
from diffharness.weights.source import Float32Array, IntArray, TensorInfo

LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.context_length": 64,
    "llama.embedding_length": 24,
    "llama.feed_forward_length": 20,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 8,
    "llama.attention.value_length": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 8,
    "llama.rope.freq_base": 1000.0,
    "llama.vocab_size": 40,
}
QWEN3MOE: dict[str, Any] = {
    key.replace("llama.", "qwen3moe."): value for key, value in LLAMA.items() if key != "general.architecture"
} | {
    "general.architecture": "qwen3moe",
    "qwen3moe.expert_count": 8,
    "qwen3moe.expert_used_count": 2,
    "qwen3moe.expert_feed_forward_length": 12,
}


class RandomSource:
    """Every tensor that the metadata's architecture requires; notes what was read."""

    label = "random"

    def __init__(self, metadata: Mapping[str, Any], seed: int = 0, drop: tuple[str, ...] = ()) -> None:
        self.metadata = dict(metadata)
        self.arch = str(metadata["general.architecture"])
        generator = np.random.default_rng(seed)
        self.values: dict[str, Float32Array] = {}
        for rule in names.for_arch(self.arch).rules(metadata):
            if rule.required and rule.name not in drop:
                scale = 1.0 if len(rule.shape) == 1 else rule.shape[-1] ** -0.5
                self.values[rule.name] = (generator.standard_normal(rule.shape) * scale).astype(np.float32)
        self.reads: list[str] = []
        self.takes: list[tuple[str, int]] = []  # name and number of rows

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, value.shape, "F32", value.nbytes) for name, value in self.values.items()}

    def read(self, name: str) -> Float32Array:
        self.reads.append(name)
        return self.values[name]

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        taken = self.values[name][rows]
        self.takes.append((name, len(taken)))
        return taken
