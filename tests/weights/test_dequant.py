"""Every type against gguf-py and ggml's own C, to the last bit, on bytes that no quantizer would write too."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.dequant import ggml_routine, has_library
from diffharness.errors import ArtifactFileError
from diffharness.weights import dequant, room
from diffharness.weights.dequant import BLOCKS, byte_size, dequantizable, dequantize
from diffharness.weights.unpack import LAYOUTS, LUMP, LUMPED
from diffharness.weights.unpack.machine import Processor, compiled

INTEGERS = {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F64": np.float64}
BY_LIBRARY = [t for t in dequantizable() if t not in INTEGERS and has_library(t)]

# Where a block's float16 scales lie. MXFP4 and NVFP4 have bytes for scales, IQ1_M has one scale in four pieces.
HALVES = {
    **dict.fromkeys(("F16", "Q1_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ1_S"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}
ORDINARY = 0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF  # ±0, denormals, ±1, largest
BEYOND = 0x7C00, 0xFC00, 0x7C01, 0x7DFF, 0x7E00, 0xFE00, 0xFFFF  # infinities and NaN, signalling ones too
EXTREME = np.array([*ORDINARY, *BEYOND], dtype=np.uint16)


def random_blocks(type_name: str, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, BLOCKS[type_name][1]), dtype=np.uint8)


def by_gguf_py(raw: np.ndarray, type_name: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[type_name]
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw.reshape(*shape[:-1], -1), kind).reshape(shape)


def by_ggml(blocks: np.ndarray, type_name: str) -> np.ndarray:
    out = np.empty((len(blocks), BLOCKS[type_name][0]), dtype=np.float32)
    ggml_routine(type_name)(np.ascontiguousarray(blocks), out)
    return out


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == np.float32 and got.shape == want.shape
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    # The bits of a NaN depend on the operand that the machine prefers; everything else is exact.
    assert np.array_equal(got.view(np.uint32)[~nan], want.view(np.uint32)[~nan])


def assert_as_everyone(blocks: np.ndarray, type_name: str) -> None:
    shape = (len(blocks), BLOCKS[type_name][0])
    ours = dequantize(blocks, type_name, shape)
    if has_library(type_name):
        assert_same_bits(ours, by_gguf_py(blocks, type_name, shape))
    if type_name in LAYOUTS:
        assert_same_bits(ours, by_ggml(blocks, type_name))


# ── the same numbers ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("type_name", [*LAYOUTS, *LUMPED, "F32"])
def test_random_bytes(type_name: str) -> None:
    assert_as_everyone(random_blocks(type_name, 3000), type_name)


@pytest.mark.parametrize("type_name", HALVES)
def test_extreme_scales(type_name: str) -> None:
    blocks = random_blocks(type_name, 20 * len(EXTREME) ** 2)
    pairs = np.arange(len(blocks)) % len(EXTREME) ** 2  # every extreme beside every other
    for at, which in zip(HALVES[type_name], (pairs % len(EXTREME), pairs // len(EXTREME)), strict=False):
        blocks[:, at : at + 2] = EXTREME[which].view(np.uint8).reshape(-1, 2)
    assert_as_everyone(blocks, type_name)


def test_extreme_scales_in_four_pieces() -> None:
    blocks = random_blocks("IQ1_M", 40 * len(EXTREME))
    scale = np.resize(EXTREME, len(blocks))
    for i in range(4):  # the upper four bits of each of the last four words
        blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 0x0F) | (((scale >> (4 * i)) & 15) << 4)
    assert_as_everyone(blocks, "IQ1_M")


@pytest.mark.parametrize(("type_name", "n_scales"), [("MXFP4", 1), ("NVFP4", 4)])
def test_every_scale_of_one_byte(type_name: str, n_scales: int) -> None:
    blocks = random_blocks(type_name, 256 * 64)
    for i in range(n_scales):
        blocks[:, i] = np.roll(np.resize(np.arange(256), len(blocks)), 37 * i)
    assert_as_everyone(blocks, type_name)


@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_every_number_of_two_bytes(type_name: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    assert_same_bits(
        dequantize(every, type_name, every.shape), by_gguf_py(every.view(np.uint8), type_name, every.shape)
    )
    assert_same_bits(dequantize(every[:45], type_name, (45,)), dequantize(every, type_name, every.shape)[:45])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_S"])
def test_threads_give_the_same(type_name: str, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(type_name, 4321)
    shape = (blocks.shape[0], BLOCKS[type_name][0])
    whole = dequantize(blocks, type_name, shape)
    monkeypatch.setattr(dequant, "_PARALLEL_FROM", 0)
    monkeypatch.setattr(dequant, "_STREAMED_FROM", 0 if streamed else 1 << 60)
    monkeypatch.setattr(dequant, "usable_cores", lambda: 3)
    assert_same_bits(dequantize(blocks, type_name, shape), whole)


@pytest.mark.parametrize(("threads", "n_parts"), [(1, 1), (2, 2), (64, 4), (None, 3)])
def test_no_more_threads_than_told(threads: int | None, n_parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    monkeypatch.setattr(dequant, "_unpacker", lambda *_: lambda blocks, out: parts.append(len(blocks)))
    monkeypatch.setattr(dequant, "usable_cores", lambda: 3)
    dequantize(random_blocks("Q4_0", 1000), "Q4_0", (1000, 32), threads=threads)
    assert parts == [1000]  # too little for a second thread
    parts.clear()
    monkeypatch.setattr(dequant, "_PARALLEL_FROM", 0)
    dequantize(random_blocks("Q4_0", 1000), "Q4_0", (1000, 32), threads=threads)
    assert (len(parts), sum(parts)) == (n_parts, 1000)


@pytest.mark.parametrize("type_name", [*LAYOUTS, *LUMPED])
def test_values_past_the_caches_are_the_same(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(type_name, 1000)
    shape = (1000, BLOCKS[type_name][0])
    through_caches = dequantize(blocks, type_name, shape)
    monkeypatch.setattr(dequant, "_STREAMED_FROM", 0)
    assert_same_bits(dequantize(blocks, type_name, shape), through_caches)
    block, size = (LUMP, LUMP * BLOCKS[type_name][1]) if type_name in LUMPED else BLOCKS[type_name]
    layout = (LAYOUTS | LUMPED)[type_name]
    blocks, around = (
        random_blocks(type_name, 3 * size // BLOCKS[type_name][1]).reshape(3, size),
        room.floats((5, block), ""),
    )
    around[...] = 7
    compiled(layout, block, size, streamed=True)(blocks, around[1:4])
    assert (around[[0, 4]] == 7).all() and not (around[1:4] == 7).all()


def test_values_begin_with_a_cache_line() -> None:
    for n in (1, 33, 5000, 100_000):
        values = dequantize(np.zeros((n, 34), dtype=np.uint8), "Q8_0", (n, 32))
        assert values.ctypes.data % 64 == 0 and values.flags.carray and values.shape == (n, 32)
    streamed = compiled(LAYOUTS["Q8_0"], 32, 34, streamed=True)
    with pytest.raises(ValueError, match="multiple of 64 bytes"):
        streamed(random_blocks("Q8_0", 2), room.floats((97,), "")[1:65].reshape(2, 32))


@given(data=st.data(), type_name=st.sampled_from(BY_LIBRARY))
@settings(max_examples=150, deadline=None)
def test_any_bytes(data: st.DataObject, type_name: str) -> None:
    size = 2 * BLOCKS[type_name][1]
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8)
    assert_as_everyone(raw.reshape(2, -1), type_name)


@pytest.mark.parametrize("type_name", INTEGERS)
def test_plain_numbers(type_name: str) -> None:
    values = np.arange(-6, 6).astype(INTEGERS[type_name]).reshape(3, 4)
    assert np.array_equal(dequantize(values.view(np.uint8), type_name, (3, 4)), values.astype(np.float32))


# ── machine code ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_a_processor_without_extensions_gets_the_same(type_name: str) -> None:
    block, size = BLOCKS[type_name]
    blocks, out = random_blocks(type_name, 500), np.empty((500, block), dtype=np.float32)
    compiled(LAYOUTS[type_name], block, size, Processor("generic", ""))(blocks, out)
    assert_same_bits(out, by_ggml(blocks, type_name))


def test_nothing_is_written_outside_of_the_values() -> None:
    for type_name, layout in LAYOUTS.items():
        block, size = BLOCKS[type_name]
        around = np.full((5, block), 7, dtype=np.float32)
        compiled(layout, block, size)(random_blocks(type_name, 3), around[1:4])
        assert (around[[0, 4]] == 7).all()
        compiled(layout, block, size)(random_blocks(type_name, 0), around[:0])
        assert (around[[0, 4]] == 7).all()


def test_arrays_that_do_not_fit_are_refused() -> None:
    unpack = compiled(LAYOUTS["Q4_0"], 32, 18)
    blocks, out = random_blocks("Q4_0", 4), np.empty((4, 32), dtype=np.float32)
    frozen = out.copy()
    frozen.flags.writeable = False
    wide = np.zeros((4, 36), dtype=np.uint8)[:, ::2]
    for a, b in [(blocks[:3], out), (blocks, out[:3]), (blocks[:, 1:], out), (blocks, out.astype(np.float64))]:
        with pytest.raises(ValueError, match=r"expected \["):
            unpack(a, b)
    for a, b in [(wide, out), (blocks, frozen), (blocks.view(np.int8), out)]:
        with pytest.raises(ValueError, match="contiguous bytes"):
            unpack(a, b)


def test_several_threads_may_meet_a_type_at_once() -> None:
    blocks = random_blocks("Q5_K", 50)
    want = by_ggml(blocks, "Q5_K")
    dequant._unpacker.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: dequantize(blocks, "Q5_K", want.shape), range(8)):
            assert_same_bits(got, want)


def test_naming_types_loads_no_compiler() -> None:
    code = "import sys, diffharness.weights.gguf_file as g; assert 'llvmlite' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_type_that_only_gguf_py_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks("Q4_K", 700)
    want = dequantize(blocks, "Q4_K", (700, 256))
    monkeypatch.delitem(dequant.LAYOUTS, "Q4_K")
    dequant._unpacker.cache_clear()
    dequantizable.cache_clear()
    try:
        assert_same_bits(dequantize(blocks, "Q4_K", (700, 256)), want)
    finally:
        dequant._unpacker.cache_clear()
        dequantizable.cache_clear()


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


def test_the_types_that_files_have_are_all_there() -> None:
    assert set(BLOCKS) - set(dequantizable()) == {"Q8_1", "Q8_K"}  # which are only of activations
    assert {"F32", *INTEGERS, *LUMPED, *LAYOUTS} == set(dequantizable())


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
