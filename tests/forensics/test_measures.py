from __future__ import annotations

import math

import numpy as np
import pytest

from diffharness.forensics import measures
from diffharness.forensics.measures import Gauge, measure

RNG = np.random.default_rng(0)
B = RNG.standard_normal((300, 512)).astype(np.float32)
NOISE = RNG.standard_normal(B.shape).astype(np.float32)
C = B + np.float32(0.05) * NOISE


def numbers(a, b=B, c=C, type_name="Q4_0"):
    return measure(np.asarray(a, np.float32), b, c, type_name)


def test_against_plain_formulas_in_float64() -> None:
    a = B * np.float32(1.1) + np.float32(0.1) * NOISE
    got = numbers(a).artifact
    x, y = a.astype(np.float64), B.astype(np.float64)
    error = math.sqrt(((x - y) ** 2).sum() / (y**2).sum())
    rows = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    assert got.error == pytest.approx(error, rel=1e-5)
    assert got.sqnr == pytest.approx(-20 * math.log10(error), abs=1e-3)
    assert got.cos == pytest.approx((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()), abs=1e-6)
    assert got.cos_row_min == pytest.approx(rows.min(), abs=1e-6)
    assert got.cos_row_p1 == pytest.approx(np.quantile(rows, 0.01), abs=1e-6)
    assert got.cos_row_p50 == pytest.approx(np.median(rows), abs=1e-6)
    assert got.scale == pytest.approx((x * y).sum() / (y**2).sum(), rel=1e-5)
    assert got.max_abs == pytest.approx(np.abs(x - y).max(), rel=1e-5)


def test_equal_tensors_are_equal_in_every_number() -> None:
    got = numbers(B, c=None, type_name="F32")
    assert got.artifact == got.control
    assert (got.artifact.cos, got.artifact.cos_row_min, got.artifact.error, got.artifact.kl_drift) == (1, 1, 0, 0)
    assert got.artifact.sqnr == math.inf and got.artifact.outlier_kept == pytest.approx(1)
    assert got.artifact.channel_kept == 1


def test_kl_drift_sees_another_distribution_and_not_the_controls_noise() -> None:
    flat = np.sign(B) * np.float32(B.std())  # same power, no shape
    assert numbers(flat).artifact.kl_drift > 1
    control = numbers(B).control
    assert control is not None and control.kl_drift < 1e-3


def test_permuted_values_drift_in_cosine_only() -> None:
    got = numbers(RNG.permuted(B, axis=0)).artifact
    assert got.kl_drift < 1e-12 and abs(got.cos) < 0.1


def test_clipped_outliers_show_though_the_error_is_small() -> None:
    b = B.copy()
    b[::7, 3] *= 20
    limit = np.float32(np.quantile(np.abs(b), 0.9995))
    got = numbers(np.clip(b, -limit, limit), b=b, c=b + np.float32(0.05) * NOISE)
    assert got.control is not None
    assert got.artifact.outlier_kept < 0.6 and got.control.outlier_kept == pytest.approx(1, abs=0.02)
    assert got.artifact.channel_kept < got.control.channel_kept - 0.02


def test_sign_flips_of_outliers_are_no_keeping() -> None:
    assert numbers(-B).artifact.outlier_kept == pytest.approx(-1)


def test_zero_blocks_are_counted_by_expert() -> None:
    b = B.reshape(3, 100, 512)
    a = b.copy()
    a[1, 7, 32:96] = 0
    a[2, 0, :32] = 0
    got = measure(a, b, b + np.float32(1e-3), "Q4_0")
    assert (got.zero_blocks, got.zero_experts) == (3, [1, 2])


@pytest.mark.parametrize("whose", ["checkpoint", "control"])
def test_zeros_that_belong_there_are_no_damage(whose: str) -> None:
    a, b, c = B.copy(), B.copy(), B.copy()
    a[5, :32] = 0
    (b if whose == "checkpoint" else c)[5, :32] = 0
    assert measure(a, b, c, "Q4_0").zero_blocks == 0


def test_nan_and_infinity_are_counted_and_spoil_no_other_number() -> None:
    a = B.copy()
    a[0, :3] = np.nan
    a[7, 5], a[7, 6] = np.inf, -np.inf
    got = numbers(a)
    assert (got.nan, got.inf) == (3, 2)
    assert got.artifact.error == math.inf and got.artifact.sqnr == -math.inf
    assert got.artifact.max_abs == 0 and got.artifact.scale is None
    assert got.artifact.cos_row_p50 == pytest.approx(1)
    assert got.control is not None and math.isfinite(got.control.error)


@pytest.mark.parametrize(("b", "a"), [(2.0, 2.0), (0.0, 0.0), (0.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("shape", [(1,), (64,), (4, 64)])
def test_one_element_and_no_variance(shape: tuple[int, ...], b: float, a: float) -> None:
    got = measure(np.full(shape, a, np.float32), np.full(shape, b, np.float32), None, "F32").artifact
    assert got.cos == (1 if b or a == b else 0)
    assert got.error == (0 if a == b else math.inf if b == 0 else abs(a - b) / b)
    assert (got.kl_drift > 0) == (a != b)


def test_values_whose_squares_float32_cannot_hold() -> None:
    b = np.array([1.0, 1.0, 1e30, 1e30], np.float32)
    assert measure(b, b, None, "F32").artifact.error == 0
    got = measure(np.ones(4, np.float32), b, None, "F32").artifact
    assert got.error == pytest.approx(1) and got.max_abs == np.float32(1e30)
    assert got.cos == pytest.approx(2 / math.sqrt(4 * 2))


def test_empty() -> None:
    empty = np.zeros((0, 32), np.float32)
    assert measure(empty, empty, None, "F32").artifact.error == 0


def test_rows_in_parts_give_the_same_numbers() -> None:
    gauge = Gauge("Q4_0", B.shape, with_control=True)
    a = B + np.float32(0.2) * NOISE[::-1]
    for rows in (slice(0, 100), slice(100, 101), slice(101, 300)):
        gauge.feed(a[rows], B[rows], C[rows])
    parts, whole = gauge.finish(), numbers(a)
    for name in ("cos", "error", "cos_row_p1", "scale", "max_abs", "channel_kept"):
        assert getattr(parts.artifact, name) == pytest.approx(getattr(whole.artifact, name), rel=1e-6), name
    assert parts.artifact.kl_drift == pytest.approx(whole.artifact.kl_drift, rel=0.2)


def test_large_tensors_are_counted_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "COUNTED", 1 << 16)
    a = B * np.float32(1.2)
    assert numbers(a).artifact.kl_drift == pytest.approx(measure(a, B, C, "Q4_0").artifact.kl_drift, rel=0.2)


def test_bins_are_stated() -> None:
    told = measures.bins()
    assert (told.n, told.span, told.smoothing) == (19, 4.25, 0.5)
