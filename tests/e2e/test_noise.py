"""The native run of llama.cpp against the reference that rounds as it does, on tiny models of several types."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffharness.engine.runner import Engine
from diffharness.pipeline import noise
from diffharness.pipeline.engine_runs import EngineRuns
from diffharness.pipeline.inputs import open_inputs
from diffharness.pipeline.reference_runs import Precision, logits_of
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.timing import Timings
from diffharness.pipeline.work import Work
from diffharness.settings import load_engine, load_tolerances
from tests.e2e.conftest import MakePair, Pair

CASES = [("llama", "Q4_K"), ("qwen2", "Q4_1"), ("qwen3moe", "Q8_0"), ("gemma3", "IQ4_XS"), ("llama", "F16")]


def judged(pair: Pair, folder: Path, **settings: Any) -> noise.NoiseOutcome:
    engine = load_engine("native").changed(threads=1, **settings)
    inputs = open_inputs(pair.gguf, None, str(pair.fixture), None, engine)
    request = RunRequest(model=pair.gguf, engine=engine, tolerances=load_tolerances())
    native = Engine(engine).capture(pair.gguf, inputs.fixture.chunks(), folder / "native.safetensors", taps=())
    defined: Any = SimpleNamespace(logits=logits_of(inputs.artifact, inputs.fixture, Precision()))
    work, runs = Work(request, inputs, folder, Timings()), EngineRuns(native=native)
    return noise.judge_noise(work, runs, defined, Precision(), graph="pass", kernel="not_run")


@pytest.mark.parametrize(("case", "type_name"), CASES)
def test_native_runs_are_noise(case: str, type_name: str, make_pair: MakePair, tmp_path: Path) -> None:
    found = judged(make_pair(case, type_name), tmp_path)
    report = found.report
    assert found.findings == [] and report.reason is None and report.unmatched == []
    assert all(row.ok and row.nmse_local < 1e-7 for row in report.layers)
    assert report.drift is not None and 0.3 < report.drift.ratio < 3
    assert max(row.nmse_unsimulated for row in report.layers) > 1e-8
    if case == "qwen3moe":
        assert report.router is not None and report.router.decisions == 64 * 3
        assert report.router.flipped <= 4 * report.router.expected + 4


@pytest.mark.parametrize("settings", [{"flash_attn": "off"}, {"type_k": "BF16", "type_v": "BF16"}], ids=str)
def test_other_settings_are_simulated_as_well(settings: dict[str, Any], make_pair: MakePair, tmp_path: Path) -> None:
    found = judged(make_pair("llama", "Q4_K"), tmp_path, **settings)
    assert found.findings == [] and all(row.ok and row.nmse_local < 1e-7 for row in found.report.layers)
