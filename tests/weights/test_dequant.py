"""Every type against gguf-py, to the last bit, on bytes that no quantizer would write too."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffharness.errors import ArtifactFileError
from diffharness.weights import dequant
from diffharness.weights.dequant import BLOCKS, byte_size, dequantizable, dequantize

INTEGERS = {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F64": np.float64}
BY_LIBRARY = [t for t in dequantizable() if t not in INTEGERS]


def oracle(raw: np.ndarray, type_name: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[type_name]
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw.reshape(*shape[:-1], -1), kind).reshape(shape)


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == np.float32 and got.shape == want.shape
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    # The bits of a NaN depend on the operand that the machine prefers; everything else is exact.
    assert np.array_equal(got.view(np.uint32)[~nan], want.view(np.uint32)[~nan])


@pytest.mark.parametrize("type_name", BY_LIBRARY)
def test_random_bytes_are_dequantized_as_by_gguf_py(type_name: str) -> None:
    block, size = BLOCKS[type_name]
    shape = (37, 3 * max(block, 32))
    raw = np.random.default_rng(3).integers(0, 256, shape[0] * shape[1] // block * size, dtype=np.uint8)
    assert_same_bits(dequantize(raw, type_name, shape), oracle(raw, type_name, shape))


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_two_threads_and_many_runs_give_the_same(type_name: str) -> None:
    block, size = BLOCKS[type_name]
    n = dequant._PARALLEL_FROM + 5 * 256  # not a multiple of a run, and odd halves
    raw = np.random.default_rng(4).integers(0, 256, n // block * size, dtype=np.uint8)
    assert_same_bits(dequantize(raw, type_name, (n,)), oracle(raw, type_name, (n,)))


@given(data=st.data(), type_name=st.sampled_from(BY_LIBRARY))
@settings(max_examples=150, deadline=None)
def test_any_bytes(data: st.DataObject, type_name: str) -> None:
    block, size = BLOCKS[type_name]
    raw = np.frombuffer(data.draw(st.binary(min_size=2 * size, max_size=2 * size)), dtype=np.uint8)
    assert_same_bits(dequantize(raw, type_name, (2, block)), oracle(raw, type_name, (2, block)))


@pytest.mark.parametrize("type_name", INTEGERS)
def test_plain_numbers(type_name: str) -> None:
    values = np.arange(-6, 6).astype(INTEGERS[type_name]).reshape(3, 4)
    assert np.array_equal(dequantize(values.view(np.uint8), type_name, (3, 4)), values.astype(np.float32))


def test_the_types_that_files_have_are_all_there() -> None:
    cannot = set(BLOCKS) - set(dequantizable())
    assert cannot <= {"Q8_1", "Q8_K", "Q1_0"}  # two are only activations; gguf-py has no code for the third


def test_a_type_without_dequantization_names_itself_and_the_tensor() -> None:
    with pytest.raises(ArtifactFileError, match=r"blk\.3\.ffn_up\.weight has type Q8_K") as caught:
        dequantize(np.zeros(292, dtype=np.uint8), "Q8_K", (256,), tensor="blk.3.ffn_up.weight")
    assert caught.value.tensor == "blk.3.ffn_up.weight"


@pytest.mark.parametrize(("n_bytes", "shape"), [(17, (32,)), (18, (31,)), (36, (32,))])
def test_bytes_that_do_not_fit_the_shape(n_bytes: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactFileError, match="elements need"):
        dequantize(np.zeros(n_bytes, dtype=np.uint8), "Q4_0", shape)


def test_byte_size() -> None:
    assert byte_size("Q4_K", (3, 512)) == 3 * 2 * 144
    with pytest.raises(ValueError, match="whole Q4_K blocks"):
        byte_size("Q4_K", (3, 500))
