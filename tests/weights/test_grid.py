from __future__ import annotations

import gguf
import numpy as np
import pytest

from diffharness.weights.dequant import BLOCKS, dequantize
from diffharness.weights.grid import _TABLE, _UNIFORM, nearest

KINDS = [*_UNIFORM, *_TABLE]
RNG = np.random.default_rng(0)


def some_blocks(kind: str, n: int = 8) -> np.ndarray:
    """Random bytes whose float16 scales are small and finite."""
    raw = RNG.integers(0, 256, (n, BLOCKS[kind][1]), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(
        kind, (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,)
    )
    for at in scales:
        raw[:, at : at + 2] = RNG.uniform(0.01, 0.1, n).astype(np.float16).reshape(-1, 1).view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_a_level(kind: str) -> None:
    raw = some_blocks(kind)
    values = dequantize(raw, kind, (8, BLOCKS[kind][0]))
    found = nearest(raw, kind, values)
    assert found is not None
    np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_of_all_levels(kind: str) -> None:
    """Against every code in turn: the same scales, all codes equal."""
    raw = some_blocks(kind)
    values = RNG.standard_normal((8, BLOCKS[kind][0])).astype(np.float32)
    found = nearest(raw, kind, values)
    assert found is not None
    best = np.full(values.shape, np.inf)
    for levels in every_level(raw, kind):
        best = np.minimum(best, np.abs(levels - values))
    np.testing.assert_allclose(np.abs(found - values), best, atol=1e-5)


def every_level(raw: np.ndarray, kind: str):
    """The block's values with all codes 0, all 1, and so on: bytes of codes are all that is not a scale."""
    n, codes = BLOCKS[kind]
    fixed = {
        "Q4_0": [(0, 2)], "Q4_1": [(0, 4)], "Q5_0": [(0, 2)], "Q5_1": [(0, 4)], "Q8_0": [(0, 2)],
        "Q2_K": [(0, 16), (80, 84)], "Q3_K": [(96, 110)], "Q4_K": [(0, 16)], "Q5_K": [(0, 16)],
        "Q6_K": [(192, 210)], "IQ4_NL": [(0, 2)], "IQ4_XS": [(0, 8)],
    }[kind]  # fmt: skip
    for code in range(256):
        # every pattern of low bits, with the high bits (which lie apart in some types) all set or all clear
        for high in (0, 255):
            changed = raw.copy()
            keep = np.zeros(codes, dtype=bool)
            for start, end in fixed:
                keep[start:end] = True
            changed[:, ~keep] = code
            for start, end in {"Q5_0": [(2, 6)], "Q5_1": [(4, 8)], "Q5_K": [(16, 48)], "Q3_K": [(0, 32)]}.get(kind, []):
                changed[:, start:end] = high
            if kind == "Q6_K":
                for bits in (0x00, 0x55, 0xAA, 0xFF):
                    changed[:, 128:192] = bits
                    yield dequantize(changed, kind, (len(raw), n))
            else:
                yield dequantize(changed, kind, (len(raw), n))


def test_types_without_levels() -> None:
    raw = np.zeros((1, BLOCKS["IQ2_XS"][1]), dtype=np.uint8)
    assert nearest(raw, "IQ2_XS", np.zeros((1, 256), dtype=np.float32)) is None


def test_a_fresh_quantization_takes_the_nearest() -> None:
    values = RNG.standard_normal((8, 256)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    found = nearest(raw, "Q8_0", values)
    assert found is not None
    own = dequantize(raw, "Q8_0", values.shape)
    assert np.square(own - values).sum() <= 1.01 * np.square(found - values).sum()
