"""Drift against what honest rounding would cause: clean, too large, and what is made of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffharness.legs import noise
from diffharness.records.noise import LargeTap, NativeLayer, NoiseReport, NonFiniteTap
from diffharness.settings import load_tolerances

FLOORS = load_tolerances()
N, VOCAB = 512, 60
POSITIONS = np.arange(N)
ROWS = np.arange(256, N - 1)
LOGITS = (np.random.default_rng(1).standard_normal((N, VOCAB)) * 3).astype(np.float32)


def noisy(size: float, seed: int) -> np.ndarray:
    """Logits with an error whose size differs from one run of positions to the next, as real ones do."""
    rng = np.random.default_rng(seed)
    swell = np.repeat(np.exp(rng.standard_normal(N // 16) * 0.4), 16)[:, None]
    return (LOGITS + size * swell * rng.standard_normal(LOGITS.shape)).astype(np.float32)


def a_drift(native: np.ndarray, rows=ROWS):
    return noise.drift(LOGITS, noisy(0.02, 2), native, rows, POSITIONS, FLOORS)


def test_the_same_rounding_drifts_as_expected() -> None:
    found = a_drift(noisy(0.02, 3))
    assert found.ok and found.n == len(ROWS)
    assert found.low < 1.0 < found.high and 0.6 < found.ratio < 1.6
    assert found.measured.kl_mean == pytest.approx(found.expected.kl_mean, rel=0.5)
    assert [(row.start, row.stop) for row in found.positions] == [(256, 511)]
    assert found.positions[0].measured == pytest.approx(found.measured.kl_mean)


def test_less_drift_than_expected_is_no_fault() -> None:
    assert a_drift(noisy(0.001, 3)).ok and a_drift(LOGITS).ok


@pytest.mark.parametrize("size", [0.06, 0.5])
def test_more_drift_than_the_interval_allows_is_told(size: float) -> None:
    found = a_drift(noisy(size, 3))
    assert found.ok is False and found.low > found.limit


def test_a_fault_at_late_positions_only_shows_in_their_row() -> None:
    native = noisy(0.02, 3)
    native[480:] = noisy(1.0, 4)[480:]
    found = noise.drift(LOGITS, noisy(0.02, 2), native, np.arange(N - 1), POSITIONS, FLOORS)
    last = found.positions[-1]
    assert last.measured > 20 * last.expected and found.positions[0].measured < 10 * found.positions[0].expected


def test_too_few_positions_tell_nothing() -> None:
    found = a_drift(noisy(0.5, 3), rows=np.arange(400, 430))
    assert found.ok and found.low == 0.0 and found.high == math.inf and found.ratio > 100


def test_logits_that_are_not_finite_are_beyond_any_noise() -> None:
    native = noisy(0.02, 3)
    native[400, 5] = np.nan
    found = a_drift(native)
    assert found.ok is False and found.ratio == math.inf and found.measured.worst_flip == 1.0


def test_a_simulation_that_is_not_finite_judges_nothing() -> None:
    simulated = noisy(0.02, 2)
    simulated[300] = np.inf
    found = noise.drift(LOGITS, simulated, noisy(0.02, 3), ROWS, POSITIONS, FLOORS)
    assert found.ok is None and found.ratio is None and found.flips_expected is None


def test_flips_are_weighed_by_the_lead_that_was_lost() -> None:
    close, far = 300, 310
    reference, native = LOGITS.copy(), LOGITS.copy()
    reference[close, :2], reference[far, :2] = (12.0, 11.99), (12.0, 9.0)
    native[close, :2], native[far, :2] = (11.99, 12.0), (9.0, 12.0)
    found = noise.drift(reference, reference, native, ROWS, POSITIONS, FLOORS)
    p = [math.exp(12) / (math.exp(12) + math.exp(second) + np.exp(reference[row, 2:]).sum())
         for row, second in ((close, 11.99), (far, 9.0))]  # fmt: skip
    leads = [p[0] * (1 - math.exp(-0.01)), p[1] * (1 - math.exp(-3.0))]
    assert found.measured.flips == 2 and found.measured.top1 == pytest.approx(1 - 2 / len(ROWS))
    assert found.measured.worst_flip == pytest.approx(leads[1], rel=1e-4)
    assert found.measured.flips_weight == pytest.approx(sum(leads), rel=1e-4)
    assert found.expected.flips == 0 and found.flips_expected == 0.0


def test_the_number_of_flips_is_foretold() -> None:
    found = [noise.drift(LOGITS, noisy(0.1, 2), noisy(0.1, seed), ROWS, POSITIONS, FLOORS) for seed in range(10, 30)]
    mean = np.mean([each.measured.flips for each in found])
    assert found[0].flips_expected == pytest.approx(mean, rel=0.4)


# -- findings -----------------------------------------------------------------------------------------


def layer(il: int, nmse: float = 1e-13, ok: bool = True) -> NativeLayer:
    tap = f"blk.{il}.ffn_out"
    token = None if ok else 7
    return NativeLayer(layer=il, kind="global", nmse_local=nmse, tap=tap, floor=1e-6, ok=ok, token=token)


def a_report(**parts) -> NoiseReport:
    return NoiseReport(layers=[layer(0), layer(1), layer(2)], tokens=64, **parts)


def test_a_clean_report_finds_nothing() -> None:
    report = a_report(drift=a_drift(noisy(0.02, 3)))
    report.large = [LargeTap(tap="blk.1.layer_out", layer=1, token=0, largest=20000.0, share=0.3)]
    assert noise.findings(report, graph="pass", kernel="not_run", model="m.gguf") == []


def test_a_layer_beyond_rounding_withholds_the_verdict_and_names_the_tap() -> None:
    report = NoiseReport(layers=[layer(0), layer(1, 0.02, False), layer(2)], tokens=64, first_row=100)
    [finding] = noise.findings(report, graph="pass", kernel="not_run", model="my m.gguf")
    assert finding.kind == "inconclusive" and finding.next_step == "diffharness replay 'my m.gguf'"
    assert "blk.1.ffn_out differs by NMSE 2.0e-02, token 107" in finding.message and "only layer 1" in finding.message
    assert [row["layer"] for row in finding.evidence["layers"]] == [1]
    [cleared] = noise.findings(report, graph="pass", kernel="pass", model="m.gguf")
    assert cleared.kind == "inconclusive" and cleared.next_step == "diffharness matrix m.gguf"


@pytest.mark.parametrize(("graph", "kernel"), [("fail", "not_run"), ("pass", "fail"), ("fail", "fail")])
def test_where_another_leg_found_the_fault_noise_only_informs(graph, kernel) -> None:
    report = a_report(drift=a_drift(noisy(0.5, 3)))
    report.layers[1] = layer(1, 0.02, False)
    found = noise.findings(report, graph=graph, kernel=kernel, model="m.gguf")
    assert len(found) == 2 and all(finding.kind is None and finding.next_step is None for finding in found)


def test_drift_beyond_rounding_is_told_with_its_interval() -> None:
    report = a_report(drift=a_drift(noisy(0.5, 3)))
    [finding] = noise.findings(report, graph="pass", kernel="not_run", model="m.gguf")
    assert finding.kind == "inconclusive" and "drifts further than its rounding explains" in finding.message
    assert finding.evidence["low"] > finding.evidence["limit"]
    assert finding.next_step == "diffharness replay m.gguf --tokens 512"  # the first 64 are clean, step by step


def test_the_first_value_that_is_not_finite_is_named_with_what_came_near_overflow() -> None:
    report = a_report(first_row=256)
    report.non_finite = NonFiniteTap(tap="blk.1.attn_ctx", layer=1, token=30, count=12)
    report.large = [LargeTap(tap="blk.1.attn_k_rope", layer=1, token=30, largest=65000.0, share=0.99)]
    report.layers[1] = layer(1, math.inf, False)
    [finding] = noise.findings(report, graph="pass", kernel="pass", model="m.gguf")
    assert "not finite is in blk.1.attn_ctx, token 286; blk.1.attn_k_rope reaches 65000" in finding.message
    assert finding.kind == "inconclusive" and finding.next_step == "diffharness replay m.gguf --tokens 287"


def test_what_is_not_simulated_or_routed_is_not_judged_by_its_excess() -> None:
    wrong, right = noisy(0.5, 3), noisy(0.02, 3)
    for more in ({"simulated_all": False}, {"routed": True}):
        found = noise.drift(LOGITS, noisy(0.02, 2), wrong, ROWS, POSITIONS, FLOORS, **more)
        assert found.ok is None and found.low > found.limit
        assert noise.findings(NoiseReport(drift=found), graph="pass", kernel="pass", model="m.gguf") == []
        assert noise.drift(LOGITS, noisy(0.02, 2), right, ROWS, POSITIONS, FLOORS, **more).ok
