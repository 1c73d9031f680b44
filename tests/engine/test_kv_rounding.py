"""The control's rounding is that of ggml's types; the rows of an engine's cache are rounded as they are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffharness.engine.exercising import LOGITS, Exerciser, Text
from diffharness.engine.kv_rounding import ROUNDINGS, rounded, turned
from diffharness.engine.quantizer import Quantizer
from diffharness.errors import EngineError
from diffharness.metrics import nmse
from diffharness.settings import EngineSettings
from diffharness.weights.dequant import dequantize

ROWS = np.random.default_rng(0).standard_normal((7, 128)).astype(np.float32) * np.geomspace(1e-3, 10, 7)[:, None]
ROWS = ROWS.astype(np.float32)
ROWS[3, 32:64] = 0
SETTINGS = EngineSettings(threads=1, time_limit_s=120)


@pytest.mark.parametrize("name", [name for name in ROUNDINGS if name not in ("F32", "IQ4_NL")])
def test_as_ggml_rounds(name: str) -> None:
    with Quantizer(SETTINGS) as quantizer:
        blocks = quantizer.quantize(ROWS, name)
    expected = dequantize(blocks.reshape(-1), name, ROWS.shape)
    assert nmse(rounded(ROWS, name), expected) < 1e-6  # float16 scales and ties: single codes may differ


def test_iq4_nl_is_a_little_worse_than_ggml() -> None:
    with Quantizer(SETTINGS) as quantizer:
        expected = dequantize(quantizer.quantize(ROWS, "IQ4_NL").reshape(-1), "IQ4_NL", ROWS.shape)
    best, ours = nmse(expected, ROWS), nmse(rounded(ROWS, "IQ4_NL"), ROWS)
    assert best <= ours < 2 * best


def test_a_turn_is_its_own_inverse_and_keeps_lengths() -> None:
    np.testing.assert_allclose(turned(turned(ROWS)), ROWS, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(turned(ROWS), axis=1), np.linalg.norm(ROWS, axis=1), rtol=1e-5)
    narrow = ROWS[:, :48]
    assert turned(narrow) is narrow


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(EngineError, match="not whole blocks of Q8_0"):
        rounded(ROWS[:, :40], "Q8_0")
    np.testing.assert_array_equal(rounded(ROWS[:, :40], "F32"), ROWS[:, :40])


def test_an_engine_with_rounded_rows(llama_gguf: Path, ids: list[int], tmp_path: Path) -> None:
    """Rounding to F32 changes nothing, to Q4_0 a lot, to F16 what an F16 cache does."""
    plain = SETTINGS.changed(type_k="F32", type_v="F32", flash_attn="on")
    logits = {}
    with Exerciser(Text(llama_gguf, "llama", [np.array(ids)])) as cells:
        for name, settings, types in (
            ("plain", plain, None),
            ("F32", plain, ("F32", "F32")),
            ("F16", plain, ("F16", "F16")),
            ("Q4_0", plain, ("Q4_0", "Q4_0")),
            ("cache F16", plain.changed(type_k="F16", type_v="F16"), None),
        ):
            run = cells.run(settings, tmp_path / "c", rounded=types)
            logits[name] = np.array(run.open().read(LOGITS))
    np.testing.assert_array_equal(logits["F32"], logits["plain"])
    assert nmse(logits["F16"], logits["cache F16"]) < 1e-7
    assert nmse(logits["Q4_0"], logits["plain"]) > 1e-5
