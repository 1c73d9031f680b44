"""Whole commands as a user starts them: over the work that they cannot do without, and with their peaks of memory.

That work is measured beside them: evaluations by llama.cpp as processes (loading included), the reference's forward in
this process, and one quantization of the model by llama.cpp, which `inspect` needs for its control. What a command does
more is starting, reading, comparing, and whatever makes it worth its while. Linux only.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from bench.footprint import Footprint, footprint
from bench.model import (
    N_TOKENS,
    gemma3_270m,
    gemma3_checkpoint,
    smollm2,
    smollm2_checkpoint,
    token_ids,
    write_float32,
)
from bench.timing import Row, seconds
from diffharness.engine.runner import LOGITS_ONLY, Engine
from diffharness.machine import usable_cores
from diffharness.reference.runner import Reference
from diffharness.settings import load_engine
from diffharness.weights.gguf_file import GgufFile, open_gguf

VERDICTS = (0, 1, 125)  # ends of a command that did its work

# A run without the forms of the deeper commands that it carries.
BOUNDED_FORMS_OFF = ("--kernel-tokens", "0", "--grid", "none", "--no-explain", "--no-noise")


@dataclass(frozen=True)
class Command:
    """A command line without its MODEL, and the work that it is held against; `rounds` of which the median counts."""

    what: str
    words: tuple[str, ...]
    work: tuple[str, ...]
    limit: float | None = None
    rounds: int = 1
    with_checkpoint: bool = False


_RUN = ("run", "--tokens", str(N_TOKENS))
_FORWARDS = ("native 512", "strict 512", "reference")
COMMANDS = (
    Command("run, bounded forms off", (*_RUN, *BOUNDED_FORMS_OFF), _FORWARDS, limit=3.0, rounds=3),
    Command("run", _RUN, _FORWARDS),
    Command(
        "grade with checkpoint",
        ("grade", "--tokens", str(N_TOKENS)),
        ("native 512", "reference", "reference"),
        with_checkpoint=True,
    ),
    Command("inspect", ("inspect",), ("quantization",), with_checkpoint=True),
    Command("replay, 64 tokens", ("replay",), ("native 64",)),
    Command("matrix, small grid", ("matrix", "--grid", "small", "--tokens", "256"), ("native 256",) * 3),
)


def whole() -> Iterator[Row]:
    """A row for each model and command."""
    torch.set_num_threads(usable_cores())
    for name, model, checkpoint in (
        ("SmolLM2", smollm2(), smollm2_checkpoint()),
        ("Gemma 3 270M", gemma3_270m(), gemma3_checkpoint()),
    ):
        with tempfile.TemporaryDirectory() as folder, open_gguf(model) as artifact:
            work = cache(_Work(artifact, Path(folder)).seconds)
            for command in COMMANDS:
                yield _row(name, command, model, checkpoint, work)


def _row(name: str, command: Command, model: Path, checkpoint: Path, work: Callable[[str], float]) -> Row:
    words = (*command.words, *(("--checkpoint", str(checkpoint)) if command.with_checkpoint else ()))
    runs = [start(model, words) for _ in range(command.rounds)]
    spent, needed = statistics.median(run.seconds for run in runs), sum(map(work, command.work))
    peaks = max(runs, key=lambda run: run.own).peaks
    what = f"{name}, {command.what} / ({' + '.join(command.work)})"
    return Row(what, spent / needed, command.limit, f"{spent:.1f} s against {needed:.1f} s; {peaks}")


def start(model: Path, words: tuple[str, ...]) -> Footprint:
    """`diffharness` as a user starts it."""
    head, *options = words
    return footprint([sys.executable, "-m", "diffharness", head, str(model), "-q", *options], VERDICTS)


class _Work:
    """What commands are held against, by name."""

    def __init__(self, artifact: GgufFile, folder: Path) -> None:
        self._artifact, self._folder = artifact, folder
        self._plain = write_float32(artifact, folder / "f32.gguf")

    def seconds(self, name: str) -> float:
        kind, _, n_tokens = name.partition(" ")
        return {
            "native": lambda: self._evaluation("native", self._artifact.paths[0], int(n_tokens)),
            "strict": lambda: self._evaluation("strict", self._plain, int(n_tokens)),
            "reference": self._reference,
            "quantization": self._quantization,
        }[kind]()

    def _evaluation(self, settings: str, model: Path, n_tokens: int) -> float:
        ids, out = token_ids(self._artifact.vocab_size, n_tokens), self._folder / "capture"
        engine = Engine(load_engine(settings))
        found = statistics.median(
            seconds(lambda: engine.capture(model, [ids], out, taps=LOGITS_ONLY)) for _ in range(3)
        )
        out.unlink()
        return found

    def _reference(self) -> float:
        reference, ids = Reference(self._artifact), token_ids(self._artifact.vocab_size)
        reference.run([ids])
        return statistics.median(seconds(lambda: reference.run([ids])) for _ in range(3))

    def _quantization(self) -> float:
        types = {info.name: info.type for info in self._artifact.tensors.values()}
        out = self._folder / "quantized.gguf"
        engine = Engine(load_engine("native"))
        spent = seconds(lambda: engine.quantize_like(self._plain, out, types))
        out.unlink()
        return spent
