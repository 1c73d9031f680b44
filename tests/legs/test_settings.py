from __future__ import annotations

import numpy as np
import pytest

from diffharness import metrics
from diffharness.legs import settings

LOGITS = np.random.default_rng(0).standard_normal((64, 50)).astype(np.float32)
ROWS = np.arange(32, 63)


def pair(other: np.ndarray) -> settings.SettingsPair:
    return settings.judge_pair(*settings.CALLBACK, metrics.compare_logits(LOGITS, other, ROWS), floor=1e-10)


def test_the_same_logits_pass() -> None:
    outcome = settings.judge([pair(LOGITS.copy())])
    assert (outcome.leg.status, outcome.first_divergence, outcome.findings) == ("pass", None, [])
    assert outcome.leg.logits is not None and outcome.leg.logits.nmse == 0


def test_the_first_token_that_differs_is_named() -> None:
    other = LOGITS.copy()
    other[40:] += 0.01
    outcome = settings.judge([pair(LOGITS.copy()), pair(other)])
    assert outcome.leg.status == "fail"
    assert outcome.first_divergence is not None
    assert (outcome.first_divergence.leg, outcome.first_divergence.token) == ("settings", 40)
    (finding,) = outcome.findings
    assert finding.kind == "engine.settings"
    assert "callback off against callback on" in finding.message and "token 40" in finding.message


def test_nan_fails() -> None:
    other = LOGITS.copy()
    other[45, 0] = np.nan
    outcome = settings.judge([pair(other)])
    assert outcome.leg.pairs[0].first_token == 45 and not outcome.leg.pairs[0].ok


def test_no_pair_is_not_a_pass() -> None:
    outcome = settings.judge([], reason="the native engine died")
    assert (outcome.leg.status, outcome.leg.reason) == ("not_run", "the native engine died")


# -- bounds from a control ----------------------------------------------------------------------------

FLOORS = {
    "settings.same": 1e-10,
    "settings.same_token": 1e-10,
    "settings.rounding": 1e-6,
    "settings.rounding_token": 1e-5,
    "settings.factor": 10.0,
    "settings.token_factor": 30.0,
}
ALL = np.arange(len(LOGITS))


def noisy(size: float, seed: int) -> np.ndarray:
    return (LOGITS + size * np.random.default_rng(seed).standard_normal(LOGITS.shape)).astype(np.float32)


def judged(other: np.ndarray, *, base: np.ndarray, strict: np.ndarray = LOGITS) -> settings.Judgement:
    """As a cell is judged: against a base, with the distances of both to the strict engine as the control."""
    control = settings.Control.nearer(
        metrics.compare_logits(strict, base), metrics.compare_logits(strict, other), len(LOGITS)
    )
    logits = metrics.compare_logits(base, other)
    return settings.judge_logits(logits, settings.bound("rounding", control, logits.rows, FLOORS))


def test_two_honest_roundings_pass() -> None:
    for size in (1e-4, 1e-2, 0.3):
        found = judged(noisy(size, 1), base=noisy(size, 2))
        assert found.ok and found.first is None and found.above.size == 0


def test_one_token_among_many_is_found() -> None:
    """Past n_ubatch, say: 1 of 64, which the mean hides in the noise."""
    other = noisy(1e-2, 1)
    other[50] += 0.2 * np.sign(other[50])
    found = judged(other, base=noisy(1e-2, 2))
    assert not found.ok and found.first == 50 and found.above.tolist() == [50]
    assert metrics.compare_logits(LOGITS, other).nmse < found.bound.nmse  # so the mean alone would let it pass


@pytest.mark.parametrize("wrong", ["base", "cell"])
def test_a_run_that_is_wrong_cannot_excuse_itself(wrong: str) -> None:
    bad, good = noisy(0.5, 1), noisy(1e-3, 2)
    base, other = (bad, good) if wrong == "base" else (good, bad)
    assert not judged(other, base=base).ok


def test_without_a_control_the_floor_alone_binds() -> None:
    rows = np.arange(10)
    for control in (None, settings.Control(np.inf, np.full(64, np.inf))):
        limit = settings.bound("rounding", control, rows, FLOORS)
        assert limit.nmse == 1e-6 and limit.tokens.tolist() == [1e-5] * 10


def test_tokens_that_a_control_does_not_know_get_the_usual_bound() -> None:
    tokens = np.full(64, np.nan)
    tokens[:20] = 1e-3
    limit = settings.bound("rounding", settings.Control(1e-3, tokens), np.array([3, 40]), FLOORS)
    np.testing.assert_allclose(limit.tokens, 1e-5 + 30 * 1e-3)


def test_the_larger_of_two_controls() -> None:
    a, b = settings.Control(1.0, np.array([1.0, np.nan])), settings.Control(0.5, np.array([2.0, 3.0]))
    found = a.larger(b)
    assert found.nmse == 1.0 and found.tokens.tolist() == [2.0, 3.0]


def test_tokens_that_are_left_out_do_not_count() -> None:
    other = LOGITS.copy()
    other[[7, 9]] += 1
    logits = metrics.compare_logits(LOGITS, other)
    limit = settings.bound("same", None, logits.rows, FLOORS)
    out = np.zeros(64, dtype=np.bool_)
    out[7] = True
    found = settings.judge_logits(logits, limit, leave_out=out)
    assert not found.ok and found.first == 9
    out[9] = True
    assert settings.judge_logits(logits, limit, leave_out=out).ok


def test_nan_is_never_within_a_bound() -> None:
    other = LOGITS.copy()
    other[9, 3] = np.nan
    found = judged(other, base=LOGITS)
    assert not found.ok and found.first == 9


def test_a_pair_that_fails_at_one_token_says_so() -> None:
    other = noisy(1e-2, 1)
    other[50] += 0.2 * np.sign(other[50])
    base = noisy(1e-2, 2)
    found = settings.as_pair("base", "cell", metrics.compare_logits(base, other), judged(other, base=base))
    found.note = "the cell is the one"
    outcome = settings.judge([found])
    message = outcome.findings[0].message
    assert "first at token 50 with" in message and message.endswith("the cell is the one")
    assert found.token_nmse is not None and found.token_floor is not None and found.token_nmse > found.token_floor


def off_by(nmse: np.ndarray) -> metrics.LogitComparison:
    """Logits that are off by that NMSE at each token."""
    a = LOGITS[: nmse.size]
    return metrics.compare_logits(a, (a * (1 + np.sqrt(nmse)[:, None])).astype(np.float32))


def test_tokens_behind_a_flipped_one_may_be_as_far_off() -> None:
    error = np.array([0.0, 0.4, 0.1, 0.0, 0.3, 0.2, np.nan, 0.1])
    flipped = np.array([False, True, False, False, False, True, True, False])
    chunk_of = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert settings.passed_on(error, flipped, chunk_of).tolist() == [0, 0, 0.4, 0.4, 0, 0, 0.2, 0.2]


@pytest.mark.parametrize(("size", "ok"), [(0.3, True), (2.0, False)])
def test_what_a_flipped_token_passes_on_is_no_fault_and_more_is_one(size: float, ok: bool) -> None:
    logits = off_by(np.array([0.0, 0.5, size, 0.0]))
    flipped = np.array([False, True, False, False])
    limit = settings.Bound(1e-6, np.full(4, 1e-5))
    behind = settings.passed_on(logits.nmse_series, flipped, np.zeros(4, dtype=np.int64))
    found = settings.judge_logits(logits, limit, leave_out=flipped, passed_on=behind)
    assert found.ok is ok and found.above.tolist() == ([] if ok else [2])
    assert not settings.judge_logits(logits, limit, leave_out=flipped).ok


def test_a_token_before_the_flipped_one_is_not_excused() -> None:
    logits = off_by(np.array([0.3, 0.5, 0.0, 0.0]))
    flipped = np.array([False, True, False, False])
    behind = settings.passed_on(logits.nmse_series, flipped, np.zeros(4, dtype=np.int64))
    limit = settings.Bound(1e-6, np.full(4, 1e-5))
    assert settings.judge_logits(logits, limit, leave_out=flipped, passed_on=behind).first == 0


def test_where_few_tokens_make_the_mean_any_token_may_reach_it() -> None:
    tokens = np.full(64, 1e-6)
    tokens[5] = 6.4
    limit = settings.bound("rounding", settings.Control(0.1, tokens), np.array([3]), FLOORS)
    np.testing.assert_allclose(limit.tokens, 1e-5 + 30 * 0.1)


@pytest.mark.parametrize(("far", "ok"), [([7], True), ([7, 30], False)])
def test_a_token_that_no_rounding_leaves_as_it_is_may_be_as_far_off_as_another(far: list[int], ok: bool) -> None:
    tokens = np.full(64, 1e-6)
    tokens[20] = 0.5  # the control's worst, at another token
    error = np.zeros(64)
    error[far] = 2.0
    logits = off_by(error)
    control, floors = settings.Control(0.01, tokens), FLOORS | {"settings.isolated_share": 0.01}
    found = settings.judge_logits(logits, settings.bound("rounding", control, logits.rows, floors))
    assert (
        found.ok is ok
        and not settings.judge_logits(logits, settings.bound("rounding", control, logits.rows, FLOORS)).ok
    )
