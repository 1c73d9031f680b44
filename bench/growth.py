"""How seconds and peak memory grow with the tokens of one text and with layers: exponents of fitted powers.

Of the reference's forward: its seconds in this process with the weights in memory, and its memory in a process of its
own that reads the file. Of a whole `run` without the bounded forms of the deeper commands: seconds, in which starting
counts too, and memory. Tokens on SmolLM2-135M-Instruct, all in one chunk; layers on synthetic Llamas. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.commands import BOUNDED_FORMS_OFF, start
from bench.fit import exponent
from bench.model import N_TOKENS, smollm2, token_ids
from bench.reference import InMemory
from bench.timing import Row, seconds
from diffharness.fixture import from_ids, save_fixture
from diffharness.machine import usable_cores
from diffharness.pipeline import synthesizing
from diffharness.reference.runner import Reference
from diffharness.settings import load_engine
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.names._map import Sizes

TOKENS = (128, 256, 512, 1024, 2048)
LAYERS = (4, 8, 16)
SIZES = Sizes(n_embd=768, n_head=12, n_head_kv=6, head_dim=64, n_ff=3072, n_vocab=4096, n_ctx=1024)
ROUNDS = 3  # of which the shortest counts


@dataclass(frozen=True)
class Subject:
    """A model and a text of random ids; `size` is what grows."""

    size: int
    model: Path
    n_tokens: int


@dataclass(frozen=True)
class Measured:
    """Seconds and bytes."""

    forward: float
    forward_peak: float
    run: float
    run_peak: float
    run_held: float
    worker_peak: float


# What is shown, its limits as tokens and as layers grow (None: just a number), and what it is in the table's units.
SHOWN: Sequence[tuple[str, float | None, float | None, str, Callable[[Measured], float]]] = (
    ("reference's forward", 1.5, 1.1, "s", lambda found: found.forward),
    ("reference's peak memory", 1.1, 0.2, "MB", lambda found: found.forward_peak / 1e6),
    ("whole run", 1.5, 1.1, "s", lambda found: found.run),
    ("its peak memory, mapped files left out", 1.1, 0.2, "MB", lambda found: found.run_held / 1e6),
    ("its peak memory", None, None, "MB", lambda found: found.run_peak / 1e6),
    ("its engine's peak memory", None, None, "MB", lambda found: found.worker_peak / 1e6),
)


def growth() -> Iterator[Row]:
    """With tokens, then with layers."""
    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from _rows("tokens", [Subject(n, smollm2(), n) for n in TOKENS], folder)
        yield from _rows("layers", [Subject(n, _of_layers(n, folder), N_TOKENS) for n in LAYERS], folder)


def _rows(of: str, subjects: Sequence[Subject], folder: Path) -> Iterator[Row]:
    sizes, found = [subject.size for subject in subjects], [measure(subject, folder) for subject in subjects]
    for what, by_tokens, by_layers, unit, value in SHOWN:
        values = [value(each) for each in found]
        shown = ", ".join(f"{each:.2f}" if unit == "s" else f"{each:.0f}" for each in values)
        last = exponent(sizes[-2:], values[-2:])
        detail = f"{shown} {unit} at {', '.join(map(str, sizes))}; {last:.2f} between the last two"
        limit = {"tokens": by_tokens, "layers": by_layers}[of]
        yield Row(f"{what}: exponent of {of}", exponent(sizes, values), limit, detail)


def measure(subject: Subject, folder: Path) -> Measured:
    with open_gguf(subject.model) as artifact:
        ids = token_ids(artifact.vocab_size, subject.n_tokens)
        reference = Reference(InMemory(artifact))
        reference.run([ids])
        forward = min(seconds(lambda: reference.run([ids])) for _ in range(ROUNDS))
    command = [sys.executable, "-m", "bench.peak", str(subject.model), str(subject.n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    fixture = folder / "ids.json"
    save_fixture(from_ids(ids.tolist(), chunk=subject.n_tokens), fixture)
    run = start(subject.model, ("run", "--fixture", str(fixture), *BOUNDED_FORMS_OFF))
    return Measured(forward, json.loads(done.stdout)["peak"], run.seconds, run.own, run.held, run.workers)


def _of_layers(n: int, folder: Path) -> Path:
    sizes = Sizes(**{**vars(SIZES), "n_layer": n})
    request = synthesizing.SynthRequest("llama", folder / str(n), load_engine("native"), sizes, n_tokens=N_TOKENS)
    return Path(synthesizing.run(request).gguf)
