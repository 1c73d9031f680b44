"""Metrics against hand-computed cases and the textbook formulas, on random and on poisoned inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from diffharness import metrics

finite = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=finite)
logit_pairs = array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12).flatmap(
    lambda shape: st.tuples(
        *(arrays(np.float32, shape, elements=st.floats(-30, 30, width=32, allow_subnormal=False)) for _ in range(2))
    )
)
BAD = [math.nan, math.inf, -math.inf]


def random_pair(shape: tuple[int, ...], seed: int = 0, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    b = rng.standard_normal(shape).astype(np.float32)
    return (b + noise * rng.standard_normal(shape)).astype(np.float32), b


def plain_softmax(row: np.ndarray) -> np.ndarray:
    weights = [math.exp(float(v) - float(row.max())) for v in row]
    return np.array([w / math.fsum(weights) for w in weights])


def plain_kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    p, q = plain_softmax(p_logits), plain_softmax(q_logits)
    return math.fsum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))


# -- nmse ---------------------------------------------------------------------------------------------


def test_nmse_by_hand() -> None:
    a = np.array([[1, 2], [3, 4]], np.float32)
    b = np.array([[1, 1], [1, 1]], np.float32)
    assert metrics.nmse(a, b) == (0 + 1 + 4 + 9) / 4
    assert metrics.nmse_per_token(a, b).tolist() == [0.5, 6.5]
    assert metrics.nmse(b, a) == 14 / 30  # the second is the reference


def test_nmse_zero_reference() -> None:
    zero, one = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert metrics.nmse(zero, zero) == 0.0
    assert metrics.nmse(one, zero) == math.inf
    assert metrics.nmse(zero, one) == 1.0
    mixed = np.stack([zero[0], one[0]])
    assert metrics.nmse_per_token(mixed, zero).tolist() == [0.0, math.inf]


@pytest.mark.parametrize("bad", BAD)
def test_nmse_never_passes_what_is_not_finite(bad: float) -> None:
    a, b = random_pair((4, 5))
    for left, right in ((True, False), (False, True), (True, True)):
        x, y = a.copy(), b.copy()
        if left:
            x[2, 3] = bad
        if right:
            y[2, 3] = bad
        assert metrics.nmse(x, y) == math.inf
        per_token = metrics.nmse_per_token(x, y)
        assert per_token[2] == math.inf
        assert np.isfinite(np.delete(per_token, 2)).all()
        assert metrics.max_abs(x, y) == math.inf
        assert metrics.cosine(x, y) == 0.0


def test_nothing_compared_is_an_error() -> None:
    empty = np.zeros((0, 4), np.float32)
    for measure in (metrics.nmse, metrics.cosine, metrics.max_abs, metrics.kl_per_position):
        with pytest.raises(ValueError):
            measure(empty, empty)
    with pytest.raises(ValueError):
        metrics.perplexity(np.zeros(0))
    assert metrics.nmse_per_token(empty, empty).shape == (0,)


@pytest.mark.parametrize("measure", [metrics.nmse, metrics.nmse_per_token, metrics.cosine, metrics.max_abs])
def test_shapes_must_be_one(measure: object) -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        measure(np.ones((2, 3), np.float32), np.ones((3, 2), np.float32))  # type: ignore[operator]


@given(matrices)
def test_nmse_of_a_thing_and_itself_is_zero(a: np.ndarray) -> None:
    assert metrics.nmse(a, a) == 0.0
    assert metrics.max_abs(a, a) == 0.0
    assert (metrics.nmse_per_token(a, a) == 0).all()
    assert metrics.cosine(a, a) == pytest.approx(1.0, abs=1e-12)


@given(matrices, st.integers(-8, 8))
def test_nmse_does_not_see_a_common_scale(b: np.ndarray, exponent: int) -> None:
    b = np.where(np.abs(b) < 1e-30, np.float32(0), b)  # what a scale makes subnormal loses digits
    a = b + np.float32(0.5)
    scale = np.float32(2.0**exponent)  # exact in float32
    assert metrics.nmse(a * scale, b * scale) == pytest.approx(metrics.nmse(a, b), rel=1e-12)
    assert metrics.cosine(a * scale, b) == pytest.approx(metrics.cosine(a, b), abs=1e-12)
    assert metrics.max_abs(a * scale, b * scale) == pytest.approx(float(scale) * metrics.max_abs(a, b))


@given(matrices.filter(lambda m: bool((np.abs(m) > 1e-3).any())), st.sampled_from([0.5, 2.0, 4.0]))
def test_nmse_of_a_scaled_copy_is_the_square_of_the_excess(b: np.ndarray, scale: float) -> None:
    assert metrics.nmse(b * np.float32(scale), b) == pytest.approx((scale - 1) ** 2, rel=1e-9)


def test_total_is_the_power_weighted_mean_of_the_rows() -> None:
    a, b = random_pair((7, 33), seed=1)
    power = (b.astype(np.float64) ** 2).sum(axis=1)
    assert metrics.nmse(a, b) == pytest.approx(float((metrics.nmse_per_token(a, b) * power).sum() / power.sum()))


def test_small_errors_are_not_lost_in_float32() -> None:
    b = np.full((1, 100_000), 3.0, np.float32)
    a = b.copy()
    a[0, 7] = np.nextafter(np.float32(3.0), np.float32(4.0))
    step = float(a[0, 7]) - 3.0
    assert metrics.nmse(a, b) == pytest.approx(step**2 / (9.0 * 100_000), rel=1e-12)


def test_any_number_of_axes() -> None:
    a, b = random_pair((3, 4, 5), seed=2)
    assert metrics.nmse(a, b) == pytest.approx(metrics.nmse(a.reshape(-1), b.reshape(-1)), rel=1e-12)
    assert metrics.nmse_per_token(a, b).shape == (3,)


def test_cosine_by_hand() -> None:
    right, up = np.array([[1, 0]], np.float32), np.array([[0, 1]], np.float32)
    zero = np.zeros((1, 2), np.float32)
    assert metrics.cosine(right, up) == 0.0
    assert metrics.cosine(right, -right) == -1.0
    assert metrics.cosine(right + up, right) == pytest.approx(math.sqrt(0.5))
    assert metrics.cosine(zero, zero) == 1.0
    assert metrics.cosine(zero, right) == metrics.cosine(right, zero) == 0.0


# -- logits -------------------------------------------------------------------------------------------


def test_kl_by_hand() -> None:
    p = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])).astype(np.float32)
    q = np.log(np.array([[0.25, 0.25, 0.5], [0.1, 0.1, 0.8]])).astype(np.float32)
    kl = metrics.kl_per_position(p, q)
    assert kl[0] == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), rel=1e-6)
    assert kl[1] == 0.0


@given(logit_pairs)
def test_kl_is_the_textbook_formula(pair: tuple[np.ndarray, np.ndarray]) -> None:
    ref, other = pair
    kl = metrics.kl_per_position(ref, other)
    assert (kl >= 0).all()
    assert kl == pytest.approx(np.array([plain_kl(r, o) for r, o in zip(ref, other, strict=True)]), rel=1e-9, abs=1e-12)
    assert (metrics.kl_per_position(ref, ref) == 0).all()


@given(logit_pairs, st.sampled_from([-16.0, 0.25, 64.0]))
def test_kl_does_not_see_a_shift(pair: tuple[np.ndarray, np.ndarray], shift: float) -> None:
    ref, other = (np.round(x * 16) / 16 for x in pair)  # the shift is exact then
    shifted = (other + np.float32(shift)).astype(np.float32)
    assert metrics.kl_per_position(ref, shifted) == pytest.approx(
        metrics.kl_per_position(ref, other), rel=1e-9, abs=1e-12
    )


def test_kl_of_tiny_noise_is_half_its_variance() -> None:
    rng = np.random.default_rng(3)
    ref = rng.standard_normal((4, 5000)).astype(np.float32)
    other = (ref + 1e-3 * rng.standard_normal(ref.shape)).astype(np.float32)
    difference = other.astype(np.float64) - ref
    p = np.stack([plain_softmax(row) for row in ref])
    mean = (p * difference).sum(axis=1, keepdims=True)
    expected = 0.5 * (p * (difference - mean) ** 2).sum(axis=1)  # second order; the third is 1e-3 of it
    assert metrics.kl_per_position(ref, other) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("bad", BAD)
def test_logits_that_are_not_finite_never_pass(bad: float) -> None:
    ref, other = random_pair((3, 8), seed=4)
    for sides in ("ref", "other", "both"):
        x, y = ref.copy(), other.copy()
        if sides != "other":
            x[1, 5] = bad
        if sides != "ref":
            y[1, 5] = bad
        kl = metrics.kl_per_position(x, y)
        assert kl[1] == math.inf
        assert np.isfinite(kl[[0, 2]]).all()
        result = metrics.compare_logits(x, y)
        assert result.nmse == result.kl_mean == result.kl_max == result.kl_p99 == math.inf
        assert result.top1 < 1.0
        assert 1 in result.flips.positions
        assert result.flips.worst == math.inf
    nll = metrics.nll_per_position(np.where(np.arange(8) == 5, np.float32(bad), ref), np.zeros(3, np.int64))
    assert (nll == math.inf).all()
    assert metrics.perplexity(nll) == math.inf


def test_nll_and_perplexity_by_hand() -> None:
    logits = np.log(np.array([[0.5, 0.5], [0.25, 0.75]])).astype(np.float32)
    nll = metrics.nll_per_position(logits, np.array([0, 0]))
    assert nll == pytest.approx([math.log(2), math.log(4)], rel=1e-6)
    assert metrics.perplexity(nll) == pytest.approx(math.sqrt(8), rel=1e-6)


@given(st.integers(2, 50), st.integers(1, 9))
def test_a_uniform_model_has_its_vocabulary_as_perplexity(n_vocab: int, n: int) -> None:
    nll = metrics.nll_per_position(np.full((n, n_vocab), 2.5, np.float32), np.arange(n) % n_vocab)
    assert metrics.perplexity(nll) == pytest.approx(n_vocab)


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([[3e38, -3e38], [1e4, 0]], np.float32)
    assert metrics.nll_per_position(logits, np.array([0, 0])).tolist() == [0.0, 0.0]
    assert metrics.perplexity(np.array([1e6])) == math.inf


@pytest.mark.parametrize("ids", [[0, 3], [-1, 0], [0], [[0], [1]]])
def test_nll_refuses_ids_that_do_not_fit(ids: list[int]) -> None:
    with pytest.raises(ValueError):
        metrics.nll_per_position(np.zeros((2, 3), np.float32), np.array(ids))


def test_flips_are_weighed_by_the_references_margin() -> None:
    ref = np.array([[3, 1, 0], [1.0, 0.75, 0], [2, 5, 1]], np.float32)
    other = np.array([[3, 1, 0], [0.9, 1.0, 0], [9, 5, 1]], np.float32)
    found = metrics.flips(ref, other)
    assert found.positions.tolist() == [1, 2]
    assert found.ref_ids.tolist() == [0, 1]
    assert found.other_ids.tolist() == [1, 0]
    assert found.margins.tolist() == [0.25, 3.0]
    assert found.worst == 3.0
    assert metrics.compare_logits(ref, other).top1 == pytest.approx(1 / 3)
    assert metrics.flips(ref, ref).worst == 0.0


@given(logit_pairs)
def test_compare_logits_is_made_of_the_single_measures(pair: tuple[np.ndarray, np.ndarray]) -> None:
    ref, other = pair
    result = metrics.compare_logits(ref, other)
    assert result.nmse == pytest.approx(metrics.nmse(other, ref))
    assert result.nmse_series == pytest.approx(metrics.nmse_per_token(other, ref))
    kl = metrics.kl_per_position(ref, other)
    assert result.kl_series == pytest.approx(kl)
    assert (result.kl_mean, result.kl_median, result.kl_max) == pytest.approx((kl.mean(), np.median(kl), kl.max()))
    assert result.kl_median <= result.kl_p99 <= result.kl_max or result.kl_max == pytest.approx(result.kl_p99)
    assert result.top1 == pytest.approx(1 - len(metrics.flips(ref, other).positions) / len(ref))
    assert (result.flips.margins >= 0).all()


def test_compare_logits_at_rows() -> None:
    other, ref = random_pair((10, 40), seed=5, noise=1.0)
    rows = np.array([4, 7, 8])
    result = metrics.compare_logits(ref, other, rows)
    assert result.rows.tolist() == [4, 7, 8]
    assert result.kl_series == pytest.approx(metrics.kl_per_position(ref, other)[rows])
    expected = [r for r in rows if ref[r].argmax() != other[r].argmax()]
    assert expected, "the noise is meant to flip some of these"
    assert result.flips.positions.tolist() == expected  # row numbers of the whole, not of the choice
    for bad in ([], [10], [-1]):
        with pytest.raises(ValueError):
            metrics.compare_logits(ref, other, np.array(bad, dtype=np.int64))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random_pair((23, 17), seed=6, noise=1.0)
    ids = np.arange(23) % 17

    def everything() -> list[object]:
        c = metrics.compare_logits(b, a)
        found = metrics.flips(b, a)
        series = [metrics.nmse_per_token(a, b), metrics.kl_per_position(b, a), metrics.nll_per_position(b, ids)]
        return [
            *[s.tolist() for s in series],
            *[c.kl_series.tolist(), c.flips.positions.tolist(), found.positions.tolist(), found.margins.tolist()],
            pytest.approx(metrics.cosine(a, b), rel=1e-12),
            metrics.max_abs(a, b),
        ]

    whole = everything()
    for size in (1, 40, 17 * 22):
        monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", size)
        assert everything() == whole


def test_percentile() -> None:
    assert metrics.percentile(np.array([0.0, 1.0, 2.0, 3.0]), 50) == 1.5
    assert metrics.percentile(np.array([0.0, 1.0, math.inf]), 99) == math.inf
    assert metrics.percentile(np.array([0.0, 1.0, 2.0, math.inf]), 25) <= 1.0
