"""Peak memory of one reference forward, as JSON: `python -m bench.peak MODEL.gguf TOKENS`. Linux only.

`peak` is what the forward adds to the process's resident memory at its highest, mapped pages of the
model file included. `layer` is the largest layer's tensors in float32 (the head is read in chunks),
`activations` the values of all of one layer's taps, `logits` the result.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from bench.model import token_ids
from diffharness import taps
from diffharness.reference.runner import Reference
from diffharness.weights.gguf_file import open_gguf


def status(field: str) -> int:
    """A memory field of /proc/self/status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def mark() -> int:
    """Set the high-water mark to what is resident now, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def main() -> None:
    path, n_tokens = sys.argv[1], int(sys.argv[2])
    with open_gguf(path) as artifact:
        layers: Counter[int] = Counter()
        for info in artifact.tensors.values():
            layer, _ = taps.split(info.name)
            if layer is not None:
                layers[layer] += info.n_elements * 4
        ids = token_ids(artifact.vocab_size, n_tokens)
        reference = Reference(artifact)

        widths: dict[str, int] = {}

        def note(name: str, own: Tensor, local: Tensor | None, rows: slice) -> None:
            widths[name] = own.shape[1]

        reference.run([ids[:2]], on_tap=note)
        of_layer: Counter[int] = Counter()
        for name, width in widths.items():
            layer, _ = taps.split(name)
            if layer is not None:
                of_layer[layer] += width * n_tokens * 4

        torch.ones(64, 64) @ torch.ones(64, 64)  # threads and their stacks are there now
        before = mark()
        logits = reference.run([ids])
        peak = status("VmHWM") - before
        assert logits is not None
        sizes = {
            "peak": peak,
            "layer": max(layers.values()),
            "activations": max(of_layer.values()),
            "logits": logits.numel() * logits.element_size(),
        }
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
