from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from diffharness.forensics.drift import Drift, TensorError
from diffharness.forensics.inspection import Inspected, conclude, drifted, tensor_rows
from diffharness.forensics.measures import Measured, measure
from diffharness.records import MetadataRow
from diffharness.records.inspect import PatternRow
from diffharness.settings import load_tolerances

FLOORS = load_tolerances()
RESTORE = "diffharness restore M --checkpoint D"
RNG = np.random.default_rng(0)
B = RNG.standard_normal((16, 512)).astype(np.float32)
C = B + np.float32(0.05) * RNG.standard_normal(B.shape).astype(np.float32)


def tensor(name: str, *, error: float = 2.5e-3, shape: tuple[int, ...] = (16, 512), **more: Any) -> TensorError:
    told: dict[str, Any] = {"control": 2.5e-3, "limit": 1e-2, "cos": 0.9, "non_finite": 0, "far_rows": 0}
    return TensorError(name, "Q4_K", shape, error, worst_row=0, **(told | more))


NAMES = [f"blk.{il}.{part}.weight" for il in range(4) for part in ("attn_q", "attn_v", "ffn_up", "ffn_down")]
SOUND = Drift([tensor(name) for name in NAMES], [], [])


def of(drift: Drift = SOUND, **more: Any) -> Inspected:
    measured: dict[str, Measured] = {t.name: measure(C, B, C, "Q4_K") for t in drift.tensors}
    return Inspected(drift, **({"measured": measured, "bpw": dict.fromkeys(NAMES, 4.5)} | more))


def verdict(inspected: Inspected):
    return conclude(inspected, FLOORS, restore=RESTORE)[0]


def damaged(*names: str) -> Drift:
    return Drift([tensor(n, error=0.5 if n in names else 2.5e-3) for n in NAMES], [], [])


def test_sound_tensors_agree() -> None:
    got = verdict(of())
    assert (got.primary, got.next_step) == ("agree", None)
    assert "16 tensors" in got.summary


def test_damage_counts_attention_and_tells_patterns_once() -> None:
    drift = damaged(NAMES[0], NAMES[2])
    place = PatternRow(kind="layer", message="attn_q, ffn_up in layer 0", tensors=[NAMES[0], NAMES[2]])
    scale = PatternRow(kind="scale", message="attn_q in layer 0: times 2", tensors=[NAMES[0]])
    got = verdict(of(drift, places=[place], relations=[scale]))
    assert got.all == ["artifact.weights"] and got.next_step == RESTORE
    assert "2 of 16 tensors drifted" in got.summary and "1 of them in attention" in got.summary
    assert "times 2" in got.summary and "attn_q, ffn_up in layer 0" in got.summary
    same = PatternRow(kind="noise", message="attn_q, ffn_up in layer 0: noise", tensors=place.tensors)
    assert verdict(of(drift, places=[place], relations=[same])).summary.count("in layer 0") == 1


def test_alike_everywhere_is_left_to_a_forward_unless_it_is_explained() -> None:
    drift = damaged(*NAMES)
    noise = PatternRow(kind="noise", message="noise", tensors=NAMES)
    got = verdict(of(drift, relations=[noise]))
    assert got.all == ["inconclusive"] and got.next_step == RESTORE
    rows = PatternRow(kind="permuted_rows", message="rows permuted", tensors=NAMES)
    assert verdict(of(drift, relations=[rows])).all == ["artifact.weights"]
    missing = replace(drift, missing=["rope_freqs.weight"])
    assert verdict(of(missing)).all == ["artifact.weights"]


def test_not_a_number_comes_before_everything() -> None:
    tensors = [tensor(NAMES[0], error=math.inf, non_finite=7), *SOUND.tensors[1:]]
    key = MetadataRow(key="m.rope.freq_base", artifact=1.0, checkpoint=2.0, used=True)
    got = verdict(of(Drift(tensors, [], []), metadata=[key]))
    assert got.all == ["artifact.file", "artifact.metadata"] and "7 values" in got.summary


def test_nothing_judged_is_inconclusive() -> None:
    drift = Drift([tensor(name, control=None, limit=math.inf) for name in NAMES], [], [])
    assert verdict(of(drift, measured={})).all == ["inconclusive"]


def test_a_distribution_beyond_the_controls_convicts_though_the_error_does_not() -> None:
    for a, why in ((np.sign(B), "KL"), (np.clip(B, -1, 1), "outliers")):
        measured = {NAMES[0]: measure(a.astype(np.float32), B, C, "Q4_K")}
        inspected = of(measured=measured)
        assert [t.name for t in drifted(SOUND, measured, FLOORS)] == [NAMES[0]]
        assert why in (tensor_rows(inspected, FLOORS)[0].why or "")


def test_rows_say_why_and_by_how_much() -> None:
    drift = Drift([tensor(NAMES[0], error=1.0, far_rows=16), tensor(NAMES[1], far_rows=3)], [], [])
    first, second = tensor_rows(of(drift), FLOORS)
    assert (first.why, second.why) == ("error; all rows", "3 of 16 rows")
    assert first.limit == 0.1 and first.drifted and second.drifted
    assert first.ratio is not None and abs(first.ratio - 1) < 0.1  # measured alike, whatever the error said


def test_ratio_of_what_is_kept_exactly_is_over_the_limit() -> None:
    drift = Drift([replace(tensor(NAMES[0], shape=(4,)), control=0.0, limit=1e-8, error=1.0)], [], [])
    measured = {NAMES[0]: measure(np.full(4, 2, np.float32), np.ones(4, np.float32), None, "F32")}
    (row,) = tensor_rows(of(drift, measured=measured), FLOORS)
    assert row.ratio is not None and math.isclose(row.ratio, 1e4)


def test_what_is_only_in_one_of_them_is_told() -> None:
    _, findings = conclude(
        of(surplus={"token_embd.weight": 64}, ignored=["model.vision_tower.x"]), FLOORS, restore=RESTORE
    )
    told = " ".join(f.message for f in findings)
    assert "64 rows of token_embd.weight" in told and "vision_tower" in told
    assert all(f.kind is None for f in findings)
