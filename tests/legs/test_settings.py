from __future__ import annotations

import numpy as np

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
