"""Which heads count as changed, and the sentences: numbers made by hand, no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffharness.forensics.attention import AttentionStats
from diffharness.forensics.attention_changes import Streams, compare
from diffharness.records.attention import AttentionHealth

KINDS = ["sliding", "sliding", "sliding", "global"] * 6
RANGES = ((1, 16), (16, 512), (512, 1024), (1024, 2048), (2048, 4096))
FLOORS = {"attention.entropy_floor": 0.05, "attention.entropy_factor": 10.0, "attention.entropy_alone": 0.6}
NOISE = 0.002


def stats(change: Any = 0.0, seed: int | None = None) -> AttentionStats:
    """All heads at 0.4, plus a change [layer, head, range], plus what quantization does."""
    entropy = np.full((24, 8, 5), 0.4) + change
    if seed is not None:
        entropy += np.random.default_rng(seed).standard_normal(entropy.shape) * NOISE
    return AttentionStats(RANGES, entropy, np.full_like(entropy, 0.1), np.full_like(entropy, 7.0))


def judged(own: Any = 0.0, local: Any = None, *, control: bool = True) -> AttentionHealth:
    artifact = Streams(stats(own, 1), stats(own if local is None else local, 2))
    beside = Streams(stats(0.0, 3), stats(0.0, 4)) if control else None
    return compare(stats(), artifact, beside, KINDS, {"the window": 1024}, FLOORS)


def test_what_the_control_does_as_well_is_no_change() -> None:
    health = judged()
    assert (health.changed, health.findings) == ([], [])


def test_flattening_of_some_layers_past_some_position() -> None:
    change = np.zeros((24, 8, 5))
    change[8:21, :, 4:] = 0.5
    (finding,) = judged(change).findings
    assert finding.kind is None  # information: what is to blame for it is the tensors' business
    assert "tends to uniform" in finding.message and "8-20" in finding.message
    assert "104 of their 104 heads" in finding.message and "only positions >= 2048 of 4096" in finding.message
    assert finding.evidence["layers"] == finding.evidence["layers_by_own_weights"] == list(range(8, 21))


def test_collapse_from_the_window_on() -> None:
    change = np.zeros((24, 8, 5))
    change[3::4, :, 3:] = -0.35
    (finding,) = judged(change).findings
    assert "collapses onto few keys" in finding.message and "only global layers" in finding.message
    assert "only positions >= 1024 (the window)" in finding.message


def test_one_head() -> None:
    change = np.zeros((24, 8, 5))
    change[6, 5] = 0.2
    health = judged(change)
    (head,) = health.changed
    assert (head.layer, head.head, head.how, head.streams) == (6, 5, "flattened", ["own", "local"])
    assert head.artifact == pytest.approx(0.6, abs=0.02) and head.checkpoint == 0.4
    assert "only layer 6 (sliding) (1 of their 8 heads), at every position" in health.findings[0].message


def test_a_change_that_comes_from_before_is_told_from_one_by_own_weights() -> None:
    own, local = np.zeros((24, 8, 5)), np.zeros((24, 8, 5))
    own[4:], local[4] = 0.3, 0.3
    (finding,) = judged(own, local).findings
    assert "4-23" in finding.message and "with the checkpoint's layer inputs only layer 4 (sliding)" in finding.message
    (finding,) = judged(own, np.zeros((24, 8, 5))).findings
    assert "what comes before brings it on" in finding.message


def test_both_ways_are_two_findings() -> None:
    change = np.zeros((24, 8, 5))
    change[2, :, 1], change[3, :, 1] = 0.3, -0.3
    messages = [finding.message for finding in judged(change).findings]
    assert len(messages) == 2 and all("only positions 16-511 of 4096" in message for message in messages)


def test_without_a_control_only_what_own_weights_do_grossly_is_told() -> None:
    own = np.zeros((24, 8, 5))
    own[4:] = 0.5
    assert judged(own, np.zeros((24, 8, 5)), control=False).changed == []
    own[5] = 0.61
    own[5, 0] = np.nan
    health = judged(np.zeros((24, 8, 5)), own + NOISE * 10, control=False)
    assert {head.layer for head in health.changed} == {5} and len(health.changed) == 7
    assert health.control is None and health.changed[0].control is None


def test_a_noisy_control_widens_the_limit_of_its_layers_only_where_they_are_noisier() -> None:
    change = np.zeros((24, 8, 5))
    change[2], change[9] = 0.2, 0.2
    loud = np.zeros((24, 8, 5))
    loud[9] = np.random.default_rng(0).standard_normal((8, 5)) * 0.05
    control = Streams(stats(loud, 3), stats(loud, 4))
    health = compare(stats(), Streams(stats(change, 1), stats(change, 2)), control, KINDS, {}, FLOORS)
    assert {head.layer for head in health.changed} == {2}


def test_the_record_has_null_for_nothing_to_average() -> None:
    change = np.zeros((24, 8, 5))
    change[0, 0, 0] = np.nan
    health = judged(change)
    assert health.artifact.entropy[0][0][0] is None
    assert AttentionHealth.model_validate_json(health.model_dump_json()) == health
