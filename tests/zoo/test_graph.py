"""The graph leg on every model of llama.cpp's own generator whose architecture has a reference.

A stranger's idea of each architecture: odd head sizes, two of two experts, arrays by layer, tensors that no released
model has. Many of llama.cpp's graphs ignore the `.scale` of a feed-forward's matrices, or apply it after the bias,
though their loaders read it: such a model is judged once more without, and both outcomes are told.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from diffharness.errors import UnsupportedError
from diffharness.fixture import from_ids, save_fixture
from diffharness.pipeline.inputs import open_artifact
from diffharness.reference.archs import BUILD
from diffharness.weights.check import MATRIX_SCALES
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import write_gguf
from diffharness.weights.source import Overlay
from tests.e2e.conftest import Pair
from tests.e2e.runs import graph_only
from tests.zoo.build import CACHE, zoo

pytestmark = [pytest.mark.zoo, pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

N_TOKENS = 80  # longer than the generator's window of 32

# The generator's seed, and the deviation of its weights: its own, and one at which attention is sharper.
MODELS = [("1", None), ("1", "0.2"), ("2", None), ("2", "0.2")]

# Models that llama.cpp computes otherwise than they are defined, beside scales: name and reason.
ENGINE_DIFFERS: dict[str, str] = {}

# Models that the reference refuses by name: name and what it does not know.
REFUSED: dict[str, str] = {}


@dataclass(frozen=True)
class Outcome:
    verdict: str
    worst: float = 0.0
    tap: str = ""

    def __str__(self) -> str:
        return f"{self.verdict}, worst {self.worst:.1e} at {self.tap}" if self.tap else self.verdict


@pytest.mark.parametrize(("seed", "deviation"), MODELS)
def test_every_graph(seed: str, deviation: str | None, tmp_path: Path, told: list[tuple[str, list[str]]]) -> None:
    lines: list[str] = []
    told.append((f"graph leg, seed {seed}, deviation {deviation or 'own'}, {N_TOKENS} tokens", lines))
    troubles = []
    for model in zoo(seed, deviation):
        with open_gguf(model) as file:
            arch = file.arch
        if arch not in BUILD:
            lines.append(f"{model.stem}: no reference of {arch}")
            continue
        outcome = judged(model, tmp_path)
        line = f"{model.stem}: {outcome}"
        if outcome.verdict == "engine.graph":
            outcome = judged(without_scales(model, tmp_path / "plain.gguf"), tmp_path)
            line += f"; without scales of matrices: {outcome}"
        for table in (ENGINE_DIFFERS, REFUSED):
            if model.stem in table:
                line += f" ({table[model.stem]})"
        expected = "engine.graph" if model.stem in ENGINE_DIFFERS else "refused" if model.stem in REFUSED else "agree"
        if not outcome.verdict.startswith(expected):
            troubles.append(line)
        lines.append(line)
    (CACHE / f"graph-{seed}-{deviation or 'own'}.txt").write_text("\n".join(lines) + "\n")
    assert not troubles


def judged(model: Path, folder: Path) -> Outcome:
    """The graph leg's verdict on random ids."""
    try:
        with open_artifact(model) as artifact:
            ids = np.random.default_rng(7).integers(0, artifact.vocab_size, N_TOKENS).tolist()
    except UnsupportedError as error:
        return Outcome(f"refused: {error.message}")
    save_fixture(from_ids(ids, name="random", chunk=N_TOKENS), folder / "ids.json")
    runs = graph_only(Pair(model, model, folder / "ids.json"), folder)
    final = runs.conventions or runs.definition
    worst, tap = max((row.nmse_local, row.tap) for row in final.judged if row.nmse_local is not None)
    return Outcome("agree" if final.ok and final.complete else "engine.graph", worst, tap)


def without_scales(model: Path, out: Path) -> Path:
    """A copy without the factors beside matrices; a router's input keeps its own."""

    def is_scale(name: str) -> bool:
        return name.endswith(tuple(f".{scale}" for scale in MATRIX_SCALES)) and "gate_inp" not in name

    with open_gguf(model) as artifact:
        source = Overlay(artifact)
        source.tensors = {name: info for name, info in artifact.tensors.items() if not is_scale(name)}
        write_gguf(out, source, type_of=lambda info: info.type, kv_from=artifact)
    return out
