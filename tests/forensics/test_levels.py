"""Faults that are smaller than what importance weights may do, and importance weights that are not to be a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from diffharness.engine.quantizer import Quantizer
from diffharness.forensics.control import Control
from diffharness.forensics.drift import TensorError, tensor_errors
from diffharness.settings import EngineSettings, load_tolerances
from diffharness.weights.dequant import dequantize
from diffharness.weights.source import TensorInfo
from tests.forensics.test_drift import Source

NAME = "blk.0.ffn_up.weight"
FLOORS = load_tolerances()
RNG = np.random.default_rng(0)
VALUES = (0.02 * RNG.standard_t(5, (64, 512))).astype(np.float32)
LEVELS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
TIGHT = ["Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


class Stored:
    """An artifact of one tensor, with its bytes."""

    label, arch = "stored", "test"

    def __init__(self, raw: np.ndarray, kind: str) -> None:
        self.metadata: dict[str, object] = {}
        self.tensors = {NAME: TensorInfo(NAME, VALUES.shape, kind, raw.size)}
        self.bytes, self.kind = raw, kind

    def raw(self, name: str) -> np.ndarray:
        return self.bytes.reshape(-1)

    def read(self, name: str) -> np.ndarray:
        return dequantize(self.bytes, self.kind, VALUES.shape)

    def take(self, name: str, rows) -> np.ndarray:
        return self.read(name)[rows]


@pytest.fixture(scope="module")
def quantizer() -> Iterator[Quantizer]:
    with Quantizer(EngineSettings(threads=1, time_limit_s=300)) as made:
        yield made


def judged(quantizer: Quantizer, raw: np.ndarray, kind: str, checkpoint: np.ndarray = VALUES) -> TensorError:
    artifact, source = Stored(raw, kind), Source({NAME: checkpoint})
    (found,) = tensor_errors(artifact, source, Control(source, artifact, quantizer.quantize), FLOORS).tensors
    return found


WEIGHTS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "equal": lambda rng: np.ones(512),
    "chi-square": lambda rng: rng.chisquare(1, 512),
    "log-normal": lambda rng: np.exp(2 * rng.standard_normal(512)),
    "spikes": lambda rng: np.where(rng.random(512) < 0.01, 1e4, 1.0),
}


@pytest.mark.parametrize("kind", [*LEVELS, "IQ3_S", "IQ3_XXS", "MXFP4"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_importance_is_no_damage(quantizer: Quantizer, kind: str, weights: str) -> None:
    importance = WEIGHTS[weights](np.random.default_rng(1)).astype(np.float32)
    found = judged(quantizer, quantizer.quantize(VALUES, kind, importance), kind)
    assert not found.damaged, (found.why, found.far_rows, found.error / found.limit)
    assert (found.misplaced is not None) is (kind in LEVELS)


@pytest.mark.parametrize(("kind", "times"), [("Q5_1", 2), ("Q6_K", 4)])
def test_importance_against_the_columns_size_is_no_damage(quantizer: Quantizer, kind: str, times: float) -> None:
    """As activations and weights often are; the error alone would be far."""
    values = (VALUES * np.exp(0.9 * RNG.standard_normal(512))).astype(np.float32)
    importance = (1 / np.square(values).mean(axis=0)).astype(np.float32)
    found = judged(quantizer, quantizer.quantize(values, kind, importance), kind, values)
    assert found.control is not None and found.error > times * found.control
    assert not found.damaged, (found.why, found.error / found.control)


def loss(quantizer: Quantizer, kind: str) -> float:
    """Root of what the type loses, in root mean squares."""
    values = dequantize(quantizer.quantize(VALUES, kind), kind, VALUES.shape)
    return float(np.sqrt(np.square(values - VALUES).mean()))


@pytest.mark.parametrize("kind", TIGHT)
def test_noise_of_half_the_types_own_loss_is_found(quantizer: Quantizer, kind: str) -> None:
    noise = 0.7 * loss(quantizer, kind) * np.random.default_rng(2).standard_normal(VALUES.shape)
    found = judged(quantizer, quantizer.quantize((VALUES + noise).astype(np.float32), kind), kind)
    assert found.error < found.limit, "the error alone would not tell"
    assert (found.damaged, found.why) == (True, ("levels",))


@pytest.mark.parametrize("kind", [*TIGHT, "IQ3_S"])
@pytest.mark.parametrize("what", ["scale", "offset"])
def test_a_scale_or_an_offset_is_found(quantizer: Quantizer, kind: str, what: str) -> None:
    """Of once the type's own loss, or one and a half where only the mean over the tensor tells."""
    size = loss(quantizer, kind) * (1.0 if kind in TIGHT else 1.5)
    rms = float(np.sqrt(np.square(VALUES).mean()))
    changed = VALUES * np.float32(1 - size / rms) if what == "scale" else VALUES + np.float32(size)
    found = judged(quantizer, quantizer.quantize(changed.astype(np.float32), kind), kind)
    assert found.damaged and found.why[0] in ("levels", what)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_wrong_block_scales_are_found(quantizer: Quantizer, kind: str) -> None:
    """Every block's scale a tenth too large: all values are levels still, but not the nearest."""
    raw = quantizer.quantize(VALUES, kind)
    blocks = raw.reshape(-1, {"Q4_K": 144, "Q8_0": 34}[kind])
    blocks[:, :2] = (blocks[:, :2].copy().view(np.float16) * np.float16(1.1)).view(np.uint8)
    found = judged(quantizer, raw, kind)
    assert found.damaged and "levels" in found.why


@pytest.mark.parametrize("kind", TIGHT)
def test_rows_of_one_head_are_told(quantizer: Quantizer, kind: str) -> None:
    changed = VALUES.copy()
    noise = 1.5 * loss(quantizer, kind) * np.random.default_rng(2).standard_normal((2, 512))
    changed[16:18] += noise.astype(np.float32)
    found = judged(quantizer, quantizer.quantize(changed, kind), kind)
    assert found.damaged and found.far is not None
    assert np.flatnonzero(found.far).tolist() == [16, 17]
    assert found.error < found.limit


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q2_K"])
def test_zeros_are_no_levels_to_rely_on(quantizer: Quantizer, kind: str) -> None:
    raw = quantizer.quantize(VALUES, kind)
    assert judged(quantizer, np.zeros_like(raw), kind).damaged
    raw[7] = 0
    found = judged(quantizer, raw, kind)
    assert found.far is not None and np.flatnonzero(found.far).tolist() == [7]


def test_what_a_type_holds_exactly(quantizer: Quantizer) -> None:
    """A checkpoint of values that the type has: no error, and none to be relative to."""
    exact = dequantize(quantizer.quantize(VALUES, "Q8_0"), "Q8_0", VALUES.shape)
    found = judged(quantizer, quantizer.quantize(exact, "Q8_0"), "Q8_0", exact)
    assert not found.damaged and found.exact
    zeros = np.zeros_like(VALUES)
    assert not judged(quantizer, quantizer.quantize(zeros, "Q4_K"), "Q4_K", zeros).damaged
