from __future__ import annotations

import numpy as np
import pytest

from diffharness.legs import native
from diffharness.legs.compare import TapComparison
from diffharness.records.noise import NativeLayer
from diffharness.settings import load_tolerances
from diffharness.taps import layer_tap

FLOORS = load_tolerances()
N, WIDTH = 64, 32
KINDS = ["sliding", "global", "sliding"]
STEPS = ("attn_q", "attn_ctx", "ffn_in", "ffn_out", "layer_out")
TAPS = ["token_embd", *(layer_tap(il, step) for il in range(3) for step in STEPS), "output_norm", "logits"]


def comparison(local: dict[str, float], own: dict[str, float], *, usual: float, rows: slice = slice(None)):
    """Errors of the size given by tap, else `usual`; those of `local` at `rows` only."""
    made = TapComparison(N)
    rng = np.random.default_rng(2)
    for tap in TAPS:
        reference = rng.standard_normal((N, WIDTH)).astype(np.float32)
        error = rng.standard_normal((N, WIDTH)).astype(np.float32)
        engine = reference + np.float32(usual) * error
        if tap in local:
            engine[rows] = reference[rows] + np.float32(local[tap]) * error[rows]
        made.feed(tap, 0, engine, engine + np.float32(own.get(tap, 1e-2)) * error, reference)
    return made


def rows_of(local: dict[str, float], own: dict[str, float] | None = None, **more) -> list[NativeLayer]:
    simulated = comparison(local, {}, usual=1e-7, **more)
    defined = comparison({}, own or {}, usual=1e-2)
    expected = {layer_tap(il, "layer_out"): 1e-4 for il in range(3)} | {"logits": 2e-4}
    return native.layers(defined, simulated, KINDS, expected, FLOORS)


def test_a_clean_run_shows_rounding_only() -> None:
    found = rows_of({})
    places = [(row.layer, row.kind) for row in found]
    assert places == [(None, "embedding"), (0, "sliding"), (1, "global"), (2, "sliding"), (None, "head")]
    for row in found:
        assert row.ok and row.token is None
        assert row.nmse_local < 1e-12 and row.nmse_unsimulated == pytest.approx(1e-4, rel=0.3)
    assert [row.nmse_expected for row in found] == [None, 1e-4, 1e-4, 1e-4, 2e-4]


def test_a_fault_shows_in_its_layer_alone_and_is_inherited_by_the_next() -> None:
    handed_on = {"blk.1.layer_out": 0.3, "blk.2.layer_out": 0.3, "logits": 0.2}
    found = rows_of({"blk.1.ffn_out": 0.2}, handed_on)
    assert [row.ok for row in found] == [True, True, False, True, True]
    assert found[2].tap == "blk.1.ffn_out" and found[2].nmse_local == pytest.approx(0.04, rel=0.2)
    inherited = [row.nmse_inherited for row in found]
    assert inherited[1] is not None and inherited[1] < 1e-3
    assert all(value is not None and value > 0.03 for value in inherited[2:])


def test_the_first_failing_tap_of_a_layer_is_the_one_to_look_at() -> None:
    found = rows_of({"blk.1.attn_ctx": 0.03, "blk.1.ffn_out": 0.5})
    assert found[2].tap == "blk.1.attn_ctx" and found[2].token == 0


def test_one_token_is_a_fault_and_one_code_that_fell_to_the_other_side_is_none() -> None:
    bad = rows_of({"blk.1.attn_q": 0.5}, rows=slice(40, 41))[2]
    assert not bad.ok and bad.token == 40
    assert rows_of({"blk.1.attn_q": 0.005}, rows=slice(40, 41))[2].ok  # at most 1/127 of a block's largest value
    assert not rows_of({"blk.1.attn_q": 0.005})[2].ok  # but not everywhere


def test_values_that_are_not_finite_fail() -> None:
    row = rows_of({"blk.2.attn_q": float("nan")})[3]
    assert not row.ok and row.nmse_local == float("inf")
