from __future__ import annotations

from pathlib import Path

import numpy as np

from diffharness.captures import Capture, CaptureWriter
from diffharness.legs import activations

N, WIDTH = 30, 5


def a_capture(tmp_path: Path, **changes: tuple[int, float]) -> Capture:
    """Taps of ones; `changes` sets one value of a token, taps written with two underscores for each dot."""
    with CaptureWriter(tmp_path / "c.safetensors", N) as writer:
        for tap in ("logits", "blk.1.attn_q", "token_embd", "blk.0.attn_v", "blk.1.attn_ctx"):
            values = np.ones((N, WIDTH), dtype=np.float32)
            if (change := changes.get(tap.replace(".", "__"))) is not None:
                values[change[0], 2] = change[1]
            writer.write(tap, 0, values)
    return Capture(tmp_path / "c.safetensors")


def test_a_clean_capture_has_nothing_to_show(tmp_path: Path) -> None:
    capture = a_capture(tmp_path)
    assert activations.first_non_finite(capture) is None
    assert activations.large(capture, 0.25) == []
    assert activations.first_non_finite_row(capture.read("logits")) is None


def test_the_first_tap_in_order_of_computation_is_named(tmp_path: Path) -> None:
    capture = a_capture(tmp_path, blk__1__attn_ctx=(3, np.nan), blk__1__attn_q=(9, np.inf), logits=(0, np.nan))
    found = activations.first_non_finite(capture)
    assert found is not None
    assert (found.tap, found.layer, found.token, found.count) == ("blk.1.attn_q", 1, 9, 1)
    assert activations.first_non_finite_row(capture.read("logits")) == 0


def test_values_near_the_end_of_float16_are_listed_the_largest_first(tmp_path: Path) -> None:
    capture = a_capture(
        tmp_path,
        blk__0__attn_v=(4, -40000.0),
        blk__1__attn_q=(5, 65000.0),
        blk__1__attn_ctx=(6, 9000.0),
        logits=(0, 1e9),
    )
    found = activations.large(capture, 0.25)
    assert [(row.tap, row.layer, row.token, row.largest) for row in found] == [
        ("blk.1.attn_q", 1, 5, 65000.0),
        ("blk.0.attn_v", 0, 4, 40000.0),
    ]
    assert 0.99 < found[0].share < 1.0


def test_infinities_do_not_hide_what_came_near(tmp_path: Path) -> None:
    capture = a_capture(tmp_path, blk__0__attn_v=(4, np.inf), blk__1__attn_q=(5, 30000.0))
    assert [row.tap for row in activations.large(capture, 0.25)] == ["blk.1.attn_q"]
