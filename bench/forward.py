"""`python -m bench.forward [ARCH...]`: the reference's forward against transformers', of every architecture it has.

Synthetic models of moderate width, float32 weights in memory on both sides, the same threads, 512 tokens; transformers
with what it chooses itself for attention and experts.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.model import N_TOKENS
from bench.reference import InMemory
from bench.timing import Row, paired
from diffharness.machine import usable_cores
from diffharness.reference.runner import Reference
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.names import MAPS
from diffharness.weights.names._map import Sizes
from diffharness.weights.synth import SynthSource

SIZES = Sizes(
    n_layer=4,
    n_embd=512,
    n_head=8,
    n_head_kv=4,
    head_dim=64,
    n_ff=1536,
    n_vocab=4096,
    n_expert=8,
    n_expert_used=2,
    n_ff_expert=512,
    window=128,
    n_ctx=1024,
)

ROUNDS = 15  # a forward takes a tenth of a second, and a neighbour may take as much of the machine

_IN_IMAGE_AND_TEXT = ("qwen2vl", "qwen3vl", "qwen3vlmoe")  # transformers has no causal model of the text by itself


def against_transformers(archs: list[str] | None = None) -> list[Row]:
    """A row for each architecture; at most as long as transformers takes is promised."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(usable_cores())
    every = [arch for arch in MAPS if MAPS[arch].transformers or arch in _IN_IMAGE_AND_TEXT]
    return [_row(arch) for arch in archs or every]


def _row(arch: str) -> Row:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    classes = AutoModelForImageTextToText if arch in _IN_IMAGE_AND_TEXT else AutoModelForCausalLM
    source = SynthSource(arch, SIZES)
    ids = np.random.default_rng(1).integers(0, SIZES.n_vocab, N_TOKENS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        write_checkpoint(folder, source, config=source.config)
        theirs = classes.from_pretrained(folder, dtype=torch.float32).eval()
        reference = Reference(InMemory(Checkpoint(folder)))
    batch = torch.from_numpy(ids)[None]

    @torch.inference_mode()
    def transformers_forward() -> object:
        return theirs(batch, use_cache=False).logits

    ratio, a, b = paired(lambda: reference.run([ids]), transformers_forward, rounds=ROUNDS)
    return Row(f"forward / transformers, {arch}", ratio, 1.0, f"{a:.3f} s against {b:.3f} s, synthetic")


if __name__ == "__main__":
    for row in against_transformers(sys.argv[1:]):
        print(f"{row.ratio:5.2f}  {row.what}: {row.detail}", flush=True)
