"""The graph leg on every model of llama.cpp's own generator whose architecture has a reference.

A stranger's idea of each architecture: odd head sizes, two of two experts, arrays by layer, tensors that no released
model has, such as scales of matrices, which many of llama.cpp's graphs ignore. Where the engine differs
(`differences`), the reference is also built as the engine computes, and must agree then and only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from diffharness.captures import Capture
from diffharness.engine.runner import Engine
from diffharness.engine.strict import strict_settings, write_strict
from diffharness.errors import UnsupportedError
from diffharness.fixture import Fixture, from_ids
from diffharness.pipeline.inputs import open_artifact
from diffharness.pipeline.reference_runs import Precision, against_engine
from diffharness.reference.archs import BUILD
from diffharness.settings import load_tolerances
from diffharness.weights.gguf_file import GgufFile, open_gguf
from tests.e2e.runs import NATIVE
from tests.zoo.build import CACHE, zoo
from tests.zoo.differences import DIFFERENCES, Difference

pytestmark = [pytest.mark.zoo, pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

N_TOKENS = 80  # longer than the generator's window of 32
N_WITH_REFERENCE = 81  # models, at least

# The generator's seed, and the deviation of its weights: its own, and one at which attention is sharper.
MODELS = [("1", None), ("1", "0.2"), ("2", None), ("2", "0.2")]

_SHOWED: set[tuple[str, str]] = set()  # models and differences without which they did not agree
_RUNS: set[tuple[str, str | None]] = set()


@dataclass(frozen=True)
class Outcome:
    verdict: str
    worst: float = 0.0
    tap: str = ""
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = f"{self.verdict}, worst {self.worst:.1e} at {self.tap}" if self.tap else self.verdict
        return told + (f", not read: {' '.join(self.unread)}" if self.unread else "")


@pytest.mark.parametrize(("seed", "deviation"), MODELS)
def test_every_graph(seed: str, deviation: str | None, tmp_path: Path, told: list[tuple[str, list[str]]]) -> None:
    lines: list[str] = []
    told.append((f"graph leg, seed {seed}, deviation {deviation or 'own'}, {N_TOKENS} tokens", lines))
    troubles = []
    for model in zoo(seed, deviation):
        with open_gguf(model) as artifact:
            if artifact.arch not in BUILD:
                lines.append(f"{model.stem}: no reference of {artifact.arch}")
                continue
            line, clean = judged(model, artifact, tmp_path)
        lines.append(f"{model.stem}: {line}")
        if not clean:
            troubles.append(lines[-1])
    (CACHE / f"graph-{seed}-{deviation or 'own'}.txt").write_text("\n".join(lines) + "\n")
    assert not troubles
    assert sum("no reference" not in line for line in lines) >= N_WITH_REFERENCE
    _RUNS.add((seed, deviation))


def test_every_difference_showed() -> None:
    if set(MODELS) != _RUNS:
        pytest.skip("says nothing unless all of MODELS were run and clean")
    assert not [(name, d.says) for name, all_of in DIFFERENCES.items() for d in all_of if (name, d.says) not in _SHOWED]


def judged(model: Path, artifact: GgufFile, folder: Path) -> tuple[str, bool]:
    """What to tell of a model, and whether it is clean: the same once what the engine does otherwise is granted."""
    ids = np.random.default_rng(7).integers(0, artifact.vocab_size, N_TOKENS).tolist()
    fixture, settings = from_ids(ids, name="random", chunk=N_TOKENS), strict_settings(NATIVE)
    strict = write_strict(artifact, artifact, folder / "strict.gguf")
    capture = Engine(settings).capture(strict, fixture.chunks(), folder / "strict.safetensors").open()

    def outcome(differences: Sequence[Difference]) -> Outcome:
        return against(model, artifact.arch, capture, fixture, differences)

    defined, known = outcome(()), DIFFERENCES.get(model.stem, ())
    if not known:
        return str(defined), defined.verdict == "agree"
    for difference in known:
        others = [d for d in known if d is not difference]
        if (model.stem, difference.says) not in _SHOWED and outcome(others).verdict != "agree":
            _SHOWED.add((model.stem, difference.says))
    granted, says = outcome(known), ", ".join(difference.says for difference in known)
    return f"{defined}; as the engine computes, which {says}: {replace(granted, unread=())}", granted.verdict == "agree"


def against(model: Path, arch: str, capture: Capture, fixture: Fixture, differences: Sequence[Difference]) -> Outcome:
    """The graph leg's verdict where the reference differs from the model's definition by these.

    Files are held against what their architecture has only where it differs by nothing.
    """
    tolerances, n_ubatch = load_tolerances(), strict_settings(NATIVE).n_ubatch
    floors = {name: tolerances[name] for name in tolerances.floors}
    build = reduce(lambda build, difference: difference.engines(build), differences, BUILD[arch])
    with patch.dict(BUILD, {arch: build}):
        try:
            with open_gguf(model) if differences else open_artifact(model) as artifact:
                runs = against_engine(artifact, capture, fixture, floors, precision=Precision(), n_ubatch=n_ubatch)
        except UnsupportedError as error:
            return Outcome(f"refused: {error.message}")
    final = runs.conventions or runs.definition
    worst, tap = max((row.nmse_local, row.tap) for row in final.judged if row.nmse_local is not None)
    unread = tuple(name for name in runs.unread if not name.endswith(".input_scale"))  # of activations, for some types
    return Outcome("agree" if final.ok and final.complete else "engine.graph", worst, tap, unread)
