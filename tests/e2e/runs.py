"""Whole runs and single graph comparisons, as tests call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffharness.engine.runner import Engine
from diffharness.engine.strict import strict_settings, write_strict
from diffharness.fixture import load_fixture
from diffharness.pipeline import RunRequest, run
from diffharness.pipeline.reference_runs import GraphRuns, Precision, against_engine
from diffharness.records import RunRecord
from diffharness.settings import load_engine, load_tolerances
from diffharness.weights.gguf_file import open_gguf
from tests.e2e.conftest import Pair

NATIVE = load_engine("native").changed(threads=1)
# Not asked of every run of the suite, for time: they have tests of their own.
BRIEF: dict[str, Any] = {"grid": None, "noise": False, "explain": False, "kernel_tokens": 16}


def whole_run(pair: Pair, *, with_checkpoint: bool = False, **changes: Any) -> RunRecord:
    """`diffharness run` on a pair, in this process; without what `BRIEF` leaves out, unless `changes` ask for it."""
    request: dict[str, Any] = {
        "model": pair.gguf,
        "engine": NATIVE,
        "tolerances": load_tolerances(),
        "fixture": str(pair.fixture),
        "checkpoint": pair.checkpoint if with_checkpoint else None,
    }
    return run(RunRequest(**(request | BRIEF | changes)))


def graph_only(pair: Pair, folder: Path) -> GraphRuns:
    """The strict engine against the reference on the pair's artifact, both passes where the first does not do."""
    fixture, settings = load_fixture(pair.fixture), strict_settings(NATIVE)
    tolerances = load_tolerances()
    with open_gguf(pair.gguf) as artifact:
        strict = write_strict(artifact, artifact, folder / "strict.gguf")
        captured = Engine(settings).capture(strict, fixture.chunks(), folder / "strict.safetensors")
        return against_engine(
            artifact,
            captured.open(),
            fixture,
            {name: tolerances[name] for name in tolerances.floors},
            precision=Precision(),
            n_ubatch=settings.n_ubatch,
        )
