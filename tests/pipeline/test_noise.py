"""The native run's error taken apart, on the embedded model: by llama.cpp, and by engines with planted faults.

A planted engine is the reference itself, rounding as llama.cpp does, on weights of which one tensor is wrong: so its
captures are what an engine with that fault would give, and what is clean of it is so to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffharness.captures import Capture, CaptureWriter
from diffharness.engine.runner import Engine, EngineCrash, EngineRun
from diffharness.pipeline import noise
from diffharness.pipeline.engine_runs import EngineRuns
from diffharness.pipeline.inputs import Inputs, open_inputs
from diffharness.pipeline.reference_runs import Precision, logits_of
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.timing import Timings
from diffharness.pipeline.work import Work
from diffharness.reference.runner import Reference
from diffharness.settings import data_dir, load_engine, load_tolerances
from tests.pipeline.test_attention import Change, Changed

EMBEDDED = data_dir("fixtures") / "tiny-gemma4"
MODEL = EMBEDDED / "tiny-gemma4-Q4_K_M.gguf"
SETTINGS = load_engine("native").changed(threads=1)


@pytest.fixture(scope="module")
def inputs() -> Iterator[Inputs]:
    opened = open_inputs(MODEL, None, str(EMBEDDED / "heldout.json"), 384, SETTINGS)
    yield opened
    opened.artifact.close()


@pytest.fixture(scope="module")
def defined(inputs: Inputs) -> Any:
    return logits_of(inputs.artifact, inputs.fixture, Precision())


@pytest.fixture
def work(inputs: Inputs, tmp_path: Path) -> Work:
    request = RunRequest(model=MODEL, engine=SETTINGS, tolerances=load_tolerances())
    return Work(request, inputs, tmp_path, Timings())


def judged(work: Work, native: EngineRun | None, defined: Any, **legs: Any) -> noise.NoiseOutcome:
    runs = EngineRuns(native=native, reason=None if native else "the engine died (native): SIGSEGV")
    graph_runs: Any = SimpleNamespace(logits=defined)
    return noise.judge_noise(work, runs, graph_runs, Precision(), **({"graph": "pass", "kernel": "not_run"} | legs))


def a_run(capture: Capture, **more: Any) -> EngineRun:
    about: dict[str, Any] = {"n_nodes": 1, "load_s": 0.0, "eval_s": 0.0, "info": {"devices": ["CPU"]}}
    return EngineRun(capture.path, capture.taps, [], settings=SETTINGS, **(about | more))


def planted(work: Work, change: Change, monkeypatch: pytest.MonkeyPatch, spoil: Any = None) -> EngineRun:
    """The native run of an engine that reads `change`d weights; `spoil(tap, values)` changes its values afterwards."""
    source = Changed(work.inputs.artifact, change)
    arithmetic, reason = noise.simulation(work.inputs.artifact, a_run(_nothing(work.folder / "x.safetensors")))
    assert reason is None

    def evaluate(chunks: Any, out: Path) -> Capture:
        n_tokens = sum(len(chunk) for chunk in chunks)
        with CaptureWriter(out, n_tokens) as writer:

            def on_tap(tap: str, own: Any, _: Any, rows: slice) -> None:
                values = own.numpy().copy()
                writer.write(tap, rows.start, values if spoil is None else spoil(tap, values))

            Reference(source, arithmetic=arithmetic).run(chunks, on_tap=on_tap, keep_logits=False)
        return Capture(out)

    def capture(self: Any, model: Any, chunks: Any, out: Path, **_: Any) -> EngineRun:
        return a_run(evaluate(chunks, out))

    monkeypatch.setattr(Engine, "capture", capture)
    return a_run(evaluate(work.inputs.fixture.chunks(), work.folder / "native.safetensors"))


def _nothing(path: Path) -> Capture:
    with CaptureWriter(path, 1) as writer:
        writer.write("logits", 0, np.zeros((1, 1)))
    return Capture(path)


def test_llama_cpp_is_told_to_be_noise(work: Work, defined: Any) -> None:
    native = Engine(SETTINGS).capture(MODEL, work.inputs.fixture.chunks(), work.folder / "n.safetensors", taps=())
    found = judged(work, native, defined)
    report = found.report
    assert found.findings == [] and report.reason is None
    assert report.simulated == ["gelu_f16_table", "rope_f32_angles", "rounded_activations", "kv_cache"]
    assert report.drift is not None and report.drift.ok
    assert 0.3 < report.drift.ratio < 3 and report.drift.low < 1.2 and report.drift.high > 0.8
    assert report.tokens == 64 and report.unmatched == [] and report.router is None and report.non_finite is None
    assert len(report.layers) == 14  # twelve, the embedding and the head
    for row in report.layers:
        assert row.ok and row.nmse_local < 1e-9
        assert row.layer is None or 1e-6 < row.nmse_unsimulated < 1e-2
    last = report.layers[-1]
    assert 0.1 < last.nmse_inherited / last.nmse_expected < 10


def test_an_engine_that_rounds_like_the_reference_is_clean(
    work: Work, defined: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = judged(work, planted(work, lambda _, x: x, monkeypatch), defined)
    assert found.findings == [] and found.report.drift.ratio == pytest.approx(1.0, rel=0.1)
    assert all(row.nmse_local < 1e-12 for row in found.report.layers)


def test_one_bad_layer_is_not_blamed_on_its_successors(
    work: Work, defined: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(name: str, x: Any) -> Any:
        if name == "blk.4.ffn_down.weight":
            x[: len(x) // 2] *= 1.3  # a norm follows, which takes a factor of all rows away
        return x

    found = judged(work, planted(work, change, monkeypatch), defined)
    failing = [row for row in found.report.layers if not row.ok]
    assert [row.tap for row in failing] == ["blk.4.ffn_out"]
    assert 0.01 < failing[0].nmse_local < 0.09
    by_layer = {row.layer: row for row in found.report.layers if row.layer is not None}
    inherited = {il: row.nmse_inherited / row.nmse_expected for il, row in by_layer.items()}
    assert all(inherited[il] == pytest.approx(1.0, rel=0.2) for il in range(4))
    assert all(inherited[il] > 4 for il in range(4, 12))
    assert any("blk.4.ffn_out" in finding.message for finding in found.findings)
    assert all(finding.kind == "inconclusive" for finding in found.findings)
    settled = judged(work, planted(work, change, monkeypatch), defined, kernel="fail")
    assert settled.findings and all(finding.kind is None for finding in settled.findings)


def test_a_small_fault_that_noise_hides_shows_locally(
    work: Work, defined: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a percent in one head of one product: far below what rounding alone does end to end."""

    def change(name: str, x: Any) -> Any:
        if name == "blk.7.attn_q.weight":
            x[:16] *= 1.005
        return x

    found = judged(work, planted(work, change, monkeypatch), defined)
    assert found.report.drift.ok
    assert [row.tap for row in found.report.layers if not row.ok] == ["blk.7.attn_q"]


def test_logits_perturbed_beyond_the_noise_are_told(work: Work, defined: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def spoil(tap: str, values: Any) -> Any:
        return values + 0.1 * rng.standard_normal(values.shape).astype(np.float32) if tap == "logits" else values

    found = judged(work, planted(work, lambda _, x: x, monkeypatch, spoil), defined, kernel="pass")
    assert found.report.drift.ok is False and found.report.drift.low > 4
    assert any("drifts further" in finding.message for finding in found.findings)
    assert [row.tap for row in found.report.layers if not row.ok] == ["logits"]


@pytest.mark.parametrize("token", [20, 200])
def test_the_first_value_that_is_not_finite_is_found_wherever_it_is(
    work: Work, defined: Any, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    """Also far behind the tokens that are looked at otherwise."""

    def spoil(tap: str, values: Any) -> Any:
        if tap == "blk.5.attn_v":
            values[3:6, 1] = 40000.0
        if tap in ("blk.5.attn_ctx", "blk.9.ffn_out", "logits") and len(values) > token:
            values[token, 0] = np.nan
        return values

    found = judged(work, planted(work, lambda _, x: x, monkeypatch, spoil), defined)
    assert found.report.non_finite.tap == "blk.5.attn_ctx"
    assert found.report.first_row + found.report.non_finite.token == token
    assert [row.tap for row in found.report.large] == ["blk.5.attn_v"]
    leading = found.findings[0]
    assert f"blk.5.attn_ctx, token {token}; blk.5.attn_v reaches 40000" in leading.message
    assert leading.next_step.endswith(f"--tokens {token + 1}")


def test_what_cannot_be_simulated_is_said_and_not_judged(
    work: Work, defined: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planted(work, lambda _, x: x, monkeypatch)
    gpu = a_run(run.open(), info={"devices": ["CUDA0: NVIDIA H200", "CPU: x"]})
    found = judged(work, gpu, defined)
    assert found.findings == [] and found.report.drift is None and found.report.layers == []
    assert found.report.reason == "rounding is simulated for ggml's CPU backend, not for CUDA0: NVIDIA H200"
    cache = SETTINGS.changed(type_k="Q8_0", type_v="Q8_0")
    quantized = EngineRun(run.capture, run.taps, [], 1, 0.0, 0.0, {"devices": ["CPU"]}, cache)
    assert "KV cache of Q8_0" in str(noise.simulation(work.inputs.artifact, quantized)[1])


def test_without_a_native_run_there_is_only_a_reason(work: Work, defined: Any) -> None:
    found = judged(work, None, defined)
    assert found.findings == [] and found.report.reason == "the engine died (native): SIGSEGV"


def test_an_engine_that_dies_with_its_taps_leaves_the_drift(
    work: Work, defined: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planted(work, lambda _, x: x, monkeypatch)

    def die(*_: Any, **__: Any) -> EngineRun:
        raise EngineCrash("died of SIGSEGV in MUL_MAT", kind="signal")

    monkeypatch.setattr(Engine, "capture", die)
    found = judged(work, run, defined)
    assert found.report.drift is not None and found.report.layers == []
    assert "SIGSEGV" in str(found.report.reason)


@pytest.mark.parametrize(
    ("changes", "kept", "all_simulated"),
    [
        ({}, 50, True),  # the second chunk has 40 tokens
        ({"n_ubatch": 7}, 90, False),
        ({"n_ubatch": 64}, 14, True),
        ({"n_ubatch": 7, "flash_attn": "off"}, 90, True),
        ({"n_ubatch": 7, "type_k": "F32", "type_v": "F32"}, 90, True),
    ],
)
def test_tokens_that_flash_attention_sums_in_float16_are_not_simulated(
    changes: dict[str, Any], kept: int, all_simulated: bool
) -> None:
    chunks = [np.arange(100), np.arange(40)]
    scored = np.arange(50, 140)
    rows, simulated = noise.simulated_rows(chunks, scored, load_engine("native").changed(**changes))
    assert (len(rows), simulated) == (kept, all_simulated)
