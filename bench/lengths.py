"""The reference's forward of real models at several lengths, against transformers' and against llama.cpp's evaluation.

SmolLM2-135M-Instruct and Gemma 3 270M, one text of 128, 512 and 2048 tokens, the same threads everywhere, logits of
every position. Held against transformers and against llama.cpp on a float32 file, the reference has its weights in
memory, as they have; held against llama.cpp on the file as it is, it reads and dequantizes them anew, while llama.cpp
has the file loaded and repacked before its time begins.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.model import gemma3_270m, gemma3_checkpoint, smollm2, smollm2_checkpoint, token_ids, write_float32
from bench.reference import InMemory
from bench.timing import Row, Timed, in_turn, median_ratio, seconds
from diffharness.engine.runner import LOGITS_ONLY, Engine
from diffharness.machine import usable_cores
from diffharness.reference.runner import Reference
from diffharness.settings import load_engine
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.source import IntArray

ROUNDS = {128: 5, 512: 3, 2048: 2}  # of each length


@dataclass(frozen=True)
class Pair:
    """Two sides that are compared, and at most what ratio is promised."""

    ours: str
    theirs: str
    limit: float | None


PAIRS = (
    Pair("weights in memory", "transformers", 1.0),
    Pair("weights in memory", "llama.cpp, F32 file", None),
    Pair("dequantizing the file", "llama.cpp, the file as it is", 3.0),
)


def against_others() -> Iterator[Row]:
    """A row for each model, length and pair."""
    torch.set_num_threads(usable_cores())
    for name, model, checkpoint in (
        ("SmolLM2", smollm2(), smollm2_checkpoint()),
        ("Gemma 3 270M", gemma3_270m(), gemma3_checkpoint()),
    ):
        yield from _rows(name, model, checkpoint)


def _rows(name: str, model: Path, checkpoint: Path) -> Iterator[Row]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder, open_gguf(model) as artifact:
        plain = write_float32(artifact, Path(folder) / "f32.gguf")
        in_memory, anew = Reference(InMemory(Checkpoint(checkpoint))), Reference(artifact)

        @torch.inference_mode()
        def transformers_forward(ids: IntArray) -> object:
            return theirs(torch.from_numpy(ids)[None], use_cache=False).logits

        def evaluation(file: Path, ids: IntArray) -> float:
            """Seconds of llama.cpp's evaluation alone."""
            out = Path(folder) / "capture"
            run = Engine(load_engine("native")).capture(file, [ids], out, taps=LOGITS_ONLY)
            out.unlink()
            return run.eval_s

        def sides(ids: IntArray) -> dict[str, Timed]:
            return {
                "weights in memory": lambda: seconds(lambda: in_memory.run([ids])),
                "transformers": lambda: seconds(lambda: transformers_forward(ids)),
                "dequantizing the file": lambda: seconds(lambda: anew.run([ids])),
                "llama.cpp, F32 file": lambda: evaluation(plain, ids),
                "llama.cpp, the file as it is": lambda: evaluation(model, ids),
            }

        for n_tokens, rounds in ROUNDS.items():
            timed = sides(token_ids(artifact.vocab_size, n_tokens))
            if n_tokens == min(ROUNDS):
                in_turn(timed, 1)  # not counted: first calls
            found = in_turn(timed, rounds)
            for pair in PAIRS:
                ours, other = found[pair.ours], found[pair.theirs]
                detail = f"{statistics.median(ours):.2f} s against {statistics.median(other):.2f} s"
                what = f"{name}, {n_tokens} tokens, {pair.ours} / {pair.theirs}"
                yield Row(what, median_ratio(ours, other), pair.limit, detail)
