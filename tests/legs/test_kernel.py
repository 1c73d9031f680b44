from __future__ import annotations

import numpy as np

from diffharness import metrics
from diffharness.legs import kernel


def test_numbers_are_given_and_nothing_is_judged() -> None:
    strict = np.random.default_rng(0).standard_normal((8, 30)).astype(np.float32)
    native = strict + np.float32(0.1)
    native[3, 4] += 5
    leg = kernel.numbers(metrics.compare_logits(strict, native))
    assert leg.status == "not_run" and "numbers only" in (leg.reason or "")
    assert leg.logits is not None and leg.logits.nmse > 0.01 and leg.logits.n == 8


def test_without_a_native_run_the_reason_says_so() -> None:
    assert kernel.numbers(None, reason="the native engine died").reason == "the native engine died"
