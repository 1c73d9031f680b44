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
_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
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


def cpu_s() -> float:
    """Processor time of this process and of those that it has ended."""
    return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime for who in _WHO)


def compare(artifact_path: Path, folder: Path, n_layer: int) -> None:
    floors, seconds, last, busy = load_tolerances(), defaultdict[str, float](float), time.perf_counter(), cpu_s()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    begin, gauges = last, 0
    with open_gguf(artifact_path) as artifact, Quantizer(load_engine("native")) as quantizer:
        checkpoint = Checkpoint(folder)
        gauge: Gauge | None = None
        current = ""

        def settle(name: str) -> None:
            nonlocal gauge, current, last, gauges
            if gauge is not None:
                gauge.finish()
                gauges += 1
            layer, _ = split(current)
            now = time.perf_counter()
            seconds["layers" if layer is not None else current] += now - last
            gauge, current, last = None, name, now

        def on_tensor(name: str, info: TensorInfo, a: Any, b: Any, c: Any) -> None:
            nonlocal gauge
            if name != current:
                settle(name)
            if gauge is None:
                gauge = Gauge(info.type, info.shape, with_control=c is not None)
            gauge.feed(a, b, c)

        def on_sample(name: str, info: TensorInfo, a: Any, b: Any, c: Any) -> None:
            own = Gauge(info.type, c.shape, with_control=False)
            own.feed(c, b, None)
            own.finish()

        control = Control(checkpoint, artifact, quantizer.quantize)
        drift = tensor_errors(artifact, checkpoint, control, floors, on_tensor=on_tensor, on_sample=on_sample)
        settle("")
        total = time.perf_counter() - begin
        n_bytes = artifact.n_bytes + checkpoint.n_bytes
        n_values = sum(info.n_elements for info in artifact.tensors.values())
    used = cpu_s() - busy
    whole = seconds["layers"] / n_layer * N_LAYER + seconds["token_embd.weight"]
    damaged = [t.name for t in drift.tensors if t.damaged]
    print(
        f"{len(drift.tensors)} tensors, {n_values / 1e9:.2f} G values, {n_bytes / 1e9:.2f} GB in {total:.1f} s:",
        end=" ",
    )
    print(f"{n_bytes / total / 1e6:.0f} MB/s, {n_values / total / 1e6:.0f} M values/s; damaged: {damaged or 'none'}")
    print(f"{used:.1f} s of processor time, the quantizer's process included")
    print(f"peak resident memory {status('VmHWM') / (1 << 30):.2f} GiB")
    print(f"{seconds['layers'] / n_layer:.2f} s a layer, embedding {seconds['token_embd.weight']:.1f} s")
    print(f"{N_LAYER} layers and the embedding: {whole:.0f} s")


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
