from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffharness.replay.activation_quant import ARITHMETICS, VEC_DOT_TYPE, arithmetics, excess, rounded
from diffharness.weights.dequant import BLOCKS, TYPE_IDS, TYPE_NAMES, dequantizable, dequantize
from tests.replay.products import converted, traits

RNG = np.random.default_rng(3)
N = 1 << 16
WIDTH = 512
BYTES = {"Q8_1": 36}  # gguf-py counts the sum as a float32

KINDS = {
    "normal": RNG.standard_normal(N),
    "heavy": RNG.standard_t(1.5, N),
    "grid": np.round(RNG.standard_normal(N) * 8) / 8,  # ties of rounding, and of the largest value's sign
    "sparse": RNG.standard_normal(N) * (RNG.random(N) < 0.01),  # blocks of zeros
    "tiny": RNG.standard_normal(N) * 1e-6,  # float16 scales below the normal ones
    "positive": np.abs(RNG.standard_normal(N)) + 3,
}


def held(type_name: str, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """What ggml's own conversion holds, and of Q8_1 the excess of its stored sums."""
    size = BYTES.get(type_name, BLOCKS[type_name][1])
    raw = converted(x, type_name, x.size // BLOCKS[type_name][0] * size)
    blocks = raw.reshape(-1, size)
    if type_name == "Q8_1":
        scale, total = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
        codes = blocks[:, 4:].view(np.int8).astype(np.float32)
        return (scale * codes).reshape(x.shape), (total - scale * codes.sum(axis=1, keepdims=True)).reshape(len(x), -1)
    if type_name == "Q8_K":
        return (blocks[:, :4].copy().view(np.float32) * blocks[:, 4:260].view(np.int8)).reshape(x.shape), None
    return dequantize(raw, type_name, x.shape), None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q8_1", "Q8_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"])
def test_values_are_those_of_the_engine_to_the_last_bit(type_name: str, kind: str) -> None:
    x = KINDS[kind].astype(np.float32).reshape(-1, WIDTH)
    theirs, sums = held(type_name, x)
    # An x86 build takes the first arithmetic; elsewhere one of the others must be the engine's.
    ours = {name: rounded(torch.from_numpy(x), type_name, name).numpy() for name in arithmetics(type_name)}
    same = [name for name, values in ours.items() if np.array_equal(values, theirs)]
    assert same
    if sums is not None:
        assert np.allclose(excess(torch.from_numpy(x), same[0]).numpy(), sums, rtol=1e-4, atol=1e-6 * np.abs(x).max())


def test_each_type_meets_the_activations_that_the_engine_converts_to() -> None:
    theirs = {name: traits(name) for name in dequantizable() if traits(name).vec_dot}
    assert {name: TYPE_NAMES[each.vec_dot_type] for name, each in theirs.items()} == {
        name: VEC_DOT_TYPE[name] for name in theirs
    }
    assert set(VEC_DOT_TYPE) & set(TYPE_IDS) <= set(theirs)


@pytest.mark.parametrize("type_name", ARITHMETICS)
def test_arithmetics_differ_in_single_steps_of_rare_codes(type_name: str) -> None:
    x = torch.from_numpy(np.concatenate([KINDS["normal"], KINDS["grid"]]).astype(np.float32).reshape(-1, WIDTH))
    usual = rounded(x, type_name)
    step = x.reshape(-1, BLOCKS[type_name][0]).abs().amax(dim=1).max() / 127 * 1.001
    for name in arithmetics(type_name)[1:]:
        other = rounded(x, type_name, name)
        assert 0 < (other != usual).float().mean() < 0.01
        assert (other - usual).abs().max() <= step
        assert ((other - usual).square().sum() / usual.square().sum()) < 1e-5


def test_the_dtype_stays_and_rows_have_any_shape() -> None:
    x = torch.from_numpy(KINDS["normal"].reshape(4, -1, WIDTH))
    assert rounded(x, "Q8_0").dtype == torch.float64
    assert torch.equal(rounded(x, "Q8_0").float(), rounded(x.float(), "Q8_0"))
    assert torch.equal(rounded(x[1], "Q8_K"), rounded(x, "Q8_K")[1])
    assert excess(x).shape == (4, x.shape[1], WIDTH // 32)


def test_what_cannot_be_held() -> None:
    with pytest.raises(ValueError, match="rows of 40 elements"):
        rounded(torch.zeros(2, 40), "Q8_0")
    with pytest.raises(ValueError, match="never held as Q4_K"):
        rounded(torch.zeros(2, 256), "Q4_K")


def test_infinite_activations_do_not_pass_for_finite_ones() -> None:
    x = torch.ones(1, 32)
    x[0, 3] = float("inf")
    assert not rounded(x, "Q8_0").isfinite().all()
