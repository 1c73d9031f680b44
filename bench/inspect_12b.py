"""What comparing every tensor of a 12B model costs: `python -m bench.inspect_12b [LAYERS]`. Linux only.

Writes a checkpoint (BF16) and an artifact (Q4_K_M's mixture) of Gemma 4 12B's widths with few layers
to a temporary folder, goes through them as `diffharness inspect` does, measures included, and says
what 48 layers and the embedding would take. The values are random and repeat every 256 rows, which
makes no difference to the work.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.peak import status
from diffharness.engine.quantizer import Quantizer
from diffharness.forensics.control import Control, Quantize
from diffharness.forensics.drift import tensor_errors
from diffharness.forensics.measures import Gauge
from diffharness.settings import load_engine, load_tolerances
from diffharness.taps import split
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.convert import gguf_metadata
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import RawTensor, write_tensors
from diffharness.weights.names import MAPS
from diffharness.weights.source import Float32Array, IntArray, TensorInfo

N_LAYER = 48
PERIOD = 6  # every sixth layer is global
CONFIG: dict[str, Any] = {
    "model_type": "gemma4_text",
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}
_TILE = 256  # rows that repeat


class Random:
    """A WeightSource of a few random rows over and over."""

    label, arch = "random", "gemma4"

    def __init__(self, n_layer: int) -> None:
        kinds = ["full_attention" if il % PERIOD == PERIOD - 1 else "sliding_attention" for il in range(n_layer)]
        names = MAPS[self.arch]
        self.metadata: dict[str, Any] = names.metadata({**CONFIG, "num_hidden_layers": n_layer, "layer_types": kinds})
        self.metadata |= {"general.architecture": self.arch}
        rules = [
            rule for rule in names.rules(self.metadata) if rule.required or rule.name.endswith("layer_output_scale")
        ]
        self.tensors: Mapping[str, TensorInfo] = {
            rule.name: TensorInfo(rule.name, rule.shape, "F32", 4 * int(np.prod(rule.shape))) for rule in rules
        }

    def read(self, name: str) -> Float32Array:
        return self.take(name, slice(None))

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        shape = self.tensors[name].shape
        numbers = np.arange(shape[0])[rows]
        if len(shape) == 1:
            return np.ones(len(numbers), dtype=np.float32)
        random = np.random.default_rng(zlib.crc32(name.encode()))
        tile = random.standard_normal((_TILE, *shape[1:]), dtype=np.float32) * np.float32(0.02)
        return tile[numbers % _TILE]


def type_of(info: TensorInfo) -> str:
    """Roughly Q4_K_M's choice."""
    if len(info.shape) == 1:
        return "F32"
    layer, klass = split(info.name)
    more = klass == "attn_v.weight" or (klass == "ffn_down.weight" and (layer or 0) % 2 == 0)
    return "Q6_K" if layer is None or more else "Q4_K"


def write_artifact(path: Path, checkpoint: Checkpoint, quantize: Quantize) -> None:
    def pieces(info: TensorInfo) -> Iterator[Any]:
        kind = type_of(info)
        if kind == "F32":
            yield checkpoint.read(info.name).reshape(-1).view(np.uint8)
            return
        tile = quantize(checkpoint.take(info.name, slice(0, _TILE)), kind)
        for first in range(0, info.shape[0], _TILE):
            yield tile[: min(_TILE, info.shape[0] - first)]

    kvs = {**checkpoint.metadata, **gguf_metadata(checkpoint)}
    tensors = [
        RawTensor(info.name, info.shape, type_of(info), lambda info=info: pieces(info))  # type: ignore[misc]
        for info in checkpoint.tensors.values()
    ]
    write_tensors(path, {key: encode_value(key, value) for key, value in kvs.items()}, tensors)


@dataclass
class Clock:
    """Seconds that passed, and of this process's own work, by part: the layers together, other tensors by name."""

    passed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    worked: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    last: tuple[float, float] = field(default_factory=lambda: (time.perf_counter(), time.process_time()))

    def lap(self, tensor: str) -> None:
        part = tensor if split(tensor)[0] is None else "layers"
        now = time.perf_counter(), time.process_time()
        self.passed[part] += now[0] - self.last[0]
        self.worked[part] += now[1] - self.last[1]
        self.last = now


class Measuring:
    """What `diffharness inspect` does with the rows that pass: every measure, of artifact and control."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._name = clock, ""
        self._gauge: Gauge | None = None

    def rows(self, name: str, info: TensorInfo, a: Float32Array, b: Float32Array, c: Float32Array | None) -> None:
        if name != self._name:
            self.settle(name)
        if self._gauge is None:
            self._gauge = Gauge(info.type, info.shape, with_control=c is not None)
        self._gauge.feed(a, b, c)

    def sample(self, name: str, info: TensorInfo, a: Float32Array, b: Float32Array, c: Float32Array | None) -> None:
        if c is not None:
            gauge = Gauge(info.type, c.shape, with_control=False)
            gauge.feed(c, b, None)
            gauge.finish()

    def settle(self, following: str = "") -> None:
        if self._gauge is not None:
            self._gauge.finish()
            self._clock.lap(self._name)
        self._gauge, self._name = None, following


def compare(artifact_path: Path, folder: Path, n_layer: int) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before, begin = _children_s(), time.perf_counter()
    clock = Clock()
    measuring = Measuring(clock)
    with open_gguf(artifact_path) as artifact, Quantizer(load_engine("native")) as quantizer:
        checkpoint = Checkpoint(folder)
        control = Control(checkpoint, artifact, quantizer.quantize)
        drift = tensor_errors(
            artifact, checkpoint, control, load_tolerances(), on_tensor=measuring.rows, on_sample=measuring.sample
        )
        measuring.settle()
        total = time.perf_counter() - begin
        n_bytes = artifact.n_bytes + checkpoint.n_bytes
        n_values = sum(info.n_elements for info in artifact.tensors.values())
        n_matrices = sum(len(info.shape) > 1 for info in artifact.tensors.values())
    quantizing = (_children_s() - before) / n_matrices
    damaged = [t.name for t in drift.tensors if t.damaged]
    print(
        f"{len(drift.tensors)} tensors, {n_values / 1e9:.2f} G values, {n_bytes / 1e9:.2f} GB in {total:.1f} s:",
        end=" ",
    )
    print(f"{n_bytes / total / 1e6:.0f} MB/s, {n_values / total / 1e6:.0f} M values/s; damaged: {damaged or 'none'}")
    print(f"peak resident memory {status('VmHWM') / (1 << 30):.2f} GiB")
    for what, seconds in (("seconds", clock.passed), ("seconds of processor time", clock.worked)):
        layer, embedding = seconds["layers"] / n_layer, seconds["token_embd.weight"]
        print(f"{layer:.2f} {what} a layer, {embedding:.1f} the embedding: {layer * N_LAYER + embedding:.0f} in all")
    all_matrices = (n_matrices - 1) / n_layer * N_LAYER + 1
    print(f"{quantizing * all_matrices:.0f} more seconds of processor time in the quantizer's process, in all")


def _children_s() -> float:
    """Processor time of the processes that this one has ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    n_layer = int(sys.argv[1]) if len(sys.argv) > 1 else PERIOD
    with tempfile.TemporaryDirectory() as scratch:
        folder, path = Path(scratch) / "checkpoint", Path(scratch) / "artifact.gguf"
        write_checkpoint(folder, Random(n_layer), dtype="BF16")
        with Quantizer(load_engine("native")) as quantizer:
            write_artifact(path, Checkpoint(folder), quantizer.quantize)
        compare(path, folder, n_layer)


if __name__ == "__main__":
    main()
