"""llama-perplexity's statistics against its own sums, written out position by position, and on hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffharness import kld, metrics

RNG = np.random.default_rng(7)


def pair(
    n: int = 300, n_vocab: int = 40, noise: float = 0.4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = (3 * rng.standard_normal((n, n_vocab))).astype(np.float32)
    other = (base + noise * rng.standard_normal(base.shape)).astype(np.float32)
    return base, other, rng.integers(0, n_vocab, n)


def softmax(row: np.ndarray) -> list[float]:
    largest = float(row.max())
    weights = [math.exp(float(value) - largest) for value in row]
    return [weight / math.fsum(weights) for weight in weights]


class Sums:
    """The running sums of perplexity.cpp (`kl_divergence_result`) and what it makes of them."""

    def __init__(self, base: np.ndarray, other: np.ndarray, ids: np.ndarray) -> None:
        self.nll, self.nll_base, self.kld, self.p_diff, same = [], [], [], [], 0
        for row in range(len(base)):
            p, q = softmax(base[row]), softmax(other[row])
            self.nll.append(-math.log(q[ids[row]]))
            self.nll_base.append(-math.log(p[ids[row]]))
            self.kld.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            self.p_diff.append(q[ids[row]] - p[ids[row]])
            same += p.index(max(p)) == q.index(max(q))
        self.n = len(base)
        self.top = same / self.n
        self.top_error = math.sqrt(self.top * (1 - self.top) / (self.n - 1))

    def mean_and_uncertainty(self, values: list[float]) -> tuple[float, float]:
        f = math.fsum(values) / self.n
        df = math.fsum(v * v for v in values) / self.n - f * f
        return f, math.sqrt(df / (self.n - 1))

    def covariance(self) -> float:
        ab = math.fsum(a * b for a, b in zip(self.nll, self.nll_base, strict=True)) / self.n
        return (ab - math.fsum(self.nll) / self.n * math.fsum(self.nll_base) / self.n) / (self.n - 1)


@pytest.mark.parametrize("noise", [0.05, 0.4, 3.0])
def test_every_number_is_that_of_the_sums(noise: float) -> None:
    base, other, ids = pair(noise=noise)
    found, sums = kld.statistics(kld.series(base, other, ids)), Sums(base, other, ids)
    (log_ppl, error), (log_base, base_error) = map(sums.mean_and_uncertainty, (sums.nll, sums.nll_base))
    covariance = sums.covariance()
    ppl, ppl_base = math.exp(log_ppl), math.exp(log_base)
    ratio_error = math.sqrt(error**2 + base_error**2 - 2 * covariance)
    kl, kl_error = sums.mean_and_uncertainty(sums.kld)
    p_diff, p_diff_error = sums.mean_and_uncertainty(sums.p_diff)
    square, square_error = sums.mean_and_uncertainty([d * d for d in sums.p_diff])
    expected = [
        (found.ppl, ppl, ppl * error),
        (found.ppl_base, ppl_base, ppl_base * base_error),
        (found.ln_ratio, log_ppl - log_base, ratio_error),
        (found.ratio, ppl / ppl_base, ppl / ppl_base * ratio_error),
        (
            found.difference,
            ppl - ppl_base,
            math.sqrt((ppl * error) ** 2 + (ppl_base * base_error) ** 2 - 2 * ppl * ppl_base * covariance),
        ),
        (found.kl, kl, kl_error),
        (found.p_diff, p_diff, p_diff_error),
        (found.p_diff_rms, math.sqrt(square), 0.5 / math.sqrt(square) * square_error),
        (found.top1, sums.top, sums.top_error),
    ]
    for estimate, value, uncertainty in expected:
        assert estimate.value == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert estimate.error == pytest.approx(uncertainty, rel=1e-6)
    assert found.correlation == pytest.approx(covariance / (error * base_error), rel=1e-6)
    assert found.n == 300


@pytest.mark.parametrize("n", [101, 102])
def test_quantiles_are_those_of_the_sorted_values(n: int) -> None:
    base, other, ids = pair(n)
    series = kld.series(base, other, ids)
    found = kld.statistics(series)
    for quantiles, values in ((found.kl_quantiles, series.kl), (found.p_diff_quantiles, series.p_diff)):
        ordered = sorted(values.tolist())
        for name, value in quantiles.items():
            fraction = {"max": 1.0, "min": 0.0}.get(name)
            at = (float(name.rstrip("%")) / 100 if fraction is None else fraction) * (n - 1)
            low = int(at)
            expected = ordered[low] + (at - low) * (ordered[min(low + 1, n - 1)] - ordered[low])
            assert value == pytest.approx(expected, rel=1e-9), name
    assert list(found.kl_quantiles) == ["max", "99.9%", "99%", "95%", "90%", "50%", "10%", "5%", "1%", "0.1%", "min"]
    assert {"75%", "25%"} <= found.p_diff_quantiles.keys()


def test_series_is_what_the_metrics_say_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    base, other, ids = pair(50)
    whole = kld.series(base, other, ids)
    monkeypatch.setattr(kld, "_BLOCK_ELEMENTS", 3 * 40)
    pieces = kld.series(base, other, ids)
    np.testing.assert_array_equal(pieces.kl, whole.kl)
    np.testing.assert_array_equal(pieces.same_top, whole.same_top)
    np.testing.assert_allclose(whole.kl, metrics.kl_per_position(base, other), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(whole.nll, metrics.nll_per_position(other, ids), rtol=1e-12)
    np.testing.assert_allclose(whole.nll_base, metrics.nll_per_position(base, ids), rtol=1e-12)
    part = whole.at(np.arange(10, 20))
    np.testing.assert_array_equal(part.p_diff, whole.p_diff[10:20])


def test_the_same_on_both_sides_is_no_difference() -> None:
    base, _, ids = pair()
    found = kld.statistics(kld.series(base, base.copy(), ids))
    assert found.kl.value == found.kl_quantiles["max"] == found.ln_ratio.value == found.p_diff_rms.value == 0.0
    assert found.top1.value == found.ratio.value == 1.0
    assert found.correlation == pytest.approx(1.0)
    assert found.p_diff_rms.error is None  # 0/0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_agreement(bad: float) -> None:
    base, other, ids = pair()
    other[17, 3] = bad
    series = kld.series(base, other, ids)
    assert series.kl[17] == series.nll[17] == math.inf and not series.same_top[17]
    assert np.isfinite(np.delete(series.kl, 17)).all()
    found = kld.statistics(series)
    assert found.kl.value == found.ppl.value == found.ln_ratio.value == found.ratio.value == math.inf
    assert found.kl.error is None and found.correlation is None and found.difference.error is None
    assert found.kl_quantiles["max"] == math.inf and found.kl_quantiles["50%"] < 1
    both = base.copy()
    both[17, 3] = bad
    assert not kld.series(both, both, ids).same_top[17]


def test_few_positions_have_no_errors() -> None:
    base, other, ids = pair(10)
    found = kld.statistics(kld.series(base, other, ids))
    assert found.ppl.error is None and found.kl.error is None
    assert kld.statistics(kld.series(*pair(11))).kl.error is not None


def test_shapes_and_emptiness_are_refused() -> None:
    base, other, ids = pair(5)
    for arguments in ((base, other[:4], ids), (base, other[:, :9], ids), (base, other, ids[:4])):
        with pytest.raises(ValueError, match="one shape"):
            kld.series(*arguments)
    with pytest.raises(ValueError, match="no positions"):
        kld.statistics(kld.series(base[:0], other[:0], ids[:0]))
    with pytest.raises(ValueError, match="without a base"):
        kld.statistics(kld.alone(np.ones(20)))
    with pytest.raises(ValueError, match="no positions"):
        kld.mean(np.empty(0))


def test_means_by_position() -> None:
    base, other, ids = pair(20)
    series = kld.series(base, other, ids)
    positions = np.tile(np.arange(10), 2)
    curve = kld.by_position(series, positions, [(0, 1), (1, 4), (4, 10), (10, 99)])
    assert [(bucket.start, bucket.stop, bucket.n) for bucket in curve] == [(0, 1, 2), (1, 4, 6), (4, 10, 12)]
    assert curve[0].kl == pytest.approx((series.kl[0] + series.kl[10]) / 2)
    assert curve[1].nll == pytest.approx(series.nll[[1, 2, 3, 11, 12, 13]].mean())
    plain = kld.by_position(kld.alone(series.nll), positions, [(0, 10)])
    assert plain[0].kl is None and plain[0].nll_base is None
