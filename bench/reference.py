"""The reference's speed against transformers', and its peak memory against what it must hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.model import N_TOKENS, smollm2, smollm2_checkpoint, token_ids
from bench.timing import Row, paired
from diffharness.machine import usable_cores
from diffharness.reference.runner import Reference
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.source import Float32Array, IntArray, WeightSource


class InMemory:
    """A source whose tensors were read once."""

    def __init__(self, source: WeightSource) -> None:
        self.label, self.arch, self.metadata, self.tensors = source.label, source.arch, source.metadata, source.tensors
        self._values = {name: source.read(name) for name in source.tensors}

    def read(self, name: str) -> Float32Array:
        return self._values[name]

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self._values[name][rows]


def speed() -> list[Row]:
    """Float32 forwards of the same weights in one process, on the same threads."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(usable_cores())
    folder = smollm2_checkpoint()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = token_ids(theirs.config.vocab_size)
    batch = torch.from_numpy(ids)[None]

    @torch.inference_mode()
    def transformers_forward() -> object:
        return theirs(batch, use_cache=False).logits

    rows = []
    with open_gguf(smollm2()) as artifact:
        checkpoint = Checkpoint(folder)
        # Like for like is the first row: both forwards have the weights in memory, as float32. The
        # others add what streaming them costs: reading, and of the GGUF dequantizing.
        sources: list[tuple[str, WeightSource, float | None]] = [
            ("weights in memory", InMemory(checkpoint), 1.0),
            ("float32 checkpoint read anew", checkpoint, None),
            ("Q4_1 GGUF dequantized anew", artifact, None),
        ]
        for name, source, limit in sources:
            reference = Reference(source)
            ratio, a, b = paired(lambda r=reference: r.run([ids]), transformers_forward)  # type: ignore[misc]
            detail = f"{a:.2f} s against {b:.2f} s in transformers, weights in memory"
            rows.append(Row(f"reference forward / transformers, {name}", ratio, limit, detail))
    return rows


def memory() -> list[Row]:
    """Peak memory of one forward, measured in a process of its own."""
    command = [sys.executable, "-m", "bench.peak", str(smollm2()), str(N_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    sizes = json.loads(done.stdout)
    allowed = sizes["layer"] + sizes["activations"] + sizes["logits"]
    detail = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
    return [Row("reference peak memory / (layer + activations + logits)", sizes["peak"] / allowed, 1.0, detail)]
