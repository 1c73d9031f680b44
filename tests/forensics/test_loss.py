"""Loss beyond a control, and loss that grows with the position: planted, and clean."""

from __future__ import annotations

import numpy as np

from diffharness import kld
from diffharness.forensics.loss import beyond_control, growth
from diffharness.records.grade import KlStatistics, PositionBucket

FLOORS = {"artifact.kl_factor": 4.0, "artifact.kl_floor": 1e-6}


def stats(noise: float) -> KlStatistics:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((200, 20)).astype(np.float32)
    other = base + np.float32(noise) * rng.standard_normal(base.shape).astype(np.float32)
    return kld.statistics(kld.series(base, other, rng.integers(0, 20, 200)))


def test_loss_as_the_control_s_is_normal() -> None:
    found = beyond_control(stats(0.1), stats(0.1), FLOORS)
    assert not found.beyond and found.kl_ratio == 1.0
    assert not beyond_control(stats(0.0), stats(0.0), FLOORS).beyond
    assert beyond_control(stats(0.0), stats(0.0), FLOORS).kl_ratio is None
    assert not beyond_control(stats(0.15), stats(0.1), FLOORS).beyond  # 2.25 times the control's


def test_loss_beyond_it_is_found() -> None:
    found = beyond_control(stats(0.5), stats(0.1), FLOORS)
    assert found.beyond and found.kl_ratio is not None and found.kl_ratio > 10
    assert found.kl_limit == 4 * found.statistics.kl.value + 1e-6


def test_one_position_alone_is_not_beyond() -> None:
    own, control = stats(0.1), stats(0.1)
    own.kl.value = 100 * control.kl.value
    assert not beyond_control(own, control, FLOORS).beyond


def curve(*values: float) -> list[PositionBucket]:
    edges = [0, 1, 16, 64, 256, 1024]
    return [PositionBucket(start=edges[i], stop=edges[i + 1], n=10, nll=1.0, kl=kl) for i, kl in enumerate(values)]


def test_growth_by_position() -> None:
    told = growth(curve(5.0, 1e-3, 1e-3, 2e-3, 1e-1), 4.0, 1e-6)
    assert told == "mean KL is 1.3e-03 below position 256 and 1.0e-01 from there on"
    assert growth(curve(1e-3, 1e-3, 1e-3, 2e-3, 3e-3), 4.0, 1e-6) is None
    assert growth(curve(1e-3, 1e-3, 1e-1, 1e-3, 1e-3), 4.0, 1e-6) is None  # it does not stay
    assert growth(curve(0.0, 0.0, 0.0, 1e-7, 1e-7), 4.0, 1e-6) is None  # below the floor
    assert growth(curve(1e-6, 1e-1), 4.0, 1e-6) is None
    assert growth([], 4.0, 1e-6) is None
