from __future__ import annotations

import numpy as np
import pytest
import torch

from diffharness.forensics.rounding import STEP, far_values, largest, rounded, ways

VALUES = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)


@pytest.mark.parametrize(("name", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_rounds_as_torch_does(name: str, dtype: torch.dtype) -> None:
    expected = torch.from_numpy(VALUES).to(dtype).float().numpy()
    np.testing.assert_array_equal(rounded(VALUES, name), expected)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_a_step_is_near_and_three_are_far(name: str) -> None:
    kept = rounded(VALUES, name)
    far = far_values(largest(VALUES), name)
    assert not far(kept, kept).any()
    assert not far(kept * np.float32(1 + 0.4 * STEP[name]), kept).any()
    changed = kept.copy()
    at = np.unravel_index(np.abs(kept).argmax(), kept.shape)
    changed[at] *= np.float32(1 + 3 * STEP[name])
    assert np.argwhere(far(changed, kept)).tolist() == [list(at)]
    changed[at] = np.nan
    assert far(changed, kept)[at]


def test_values_cut_off_instead_of_rounded_are_near() -> None:
    cut = (VALUES.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    assert (cut != rounded(VALUES, "BF16")).any()
    assert not far_values(largest(VALUES), "BF16")(cut, rounded(VALUES, "BF16")).any()


def test_roundings_on_the_way_have_a_note() -> None:
    found = ways("F32", 2)
    assert [note for note, _ in found] == [None, *(f"the checkpoint's values rounded to {t}" for t in ("BF16", "F16"))]
    norm = 1 + VALUES[0]
    less_one = rounded(norm - 1, "BF16") + 1
    assert any((way(norm) == less_one).all() for note, way in ways("F32", 1) if note)
