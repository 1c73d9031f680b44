"""Dequantization of every type: against gguf-py on one core, against ggml's C routines on one and on all cores.

gguf-py is given a whole tensor in a process of its own, where the C library's allocator is as it comes: what somebody
gets who calls it. Ours is given the same tensor in this process, its allocator set as the command line sets it. What
gguf-py would gain by that setting is told beside it.

ggml's C gets a piece that fits the second-level cache, again and again, so that the processor is measured and not
memory: of a large tensor, ours and the fastest of C's routines take as long as its bytes need to be written. Counted
is the time that the threads' processors spent, not what other programs took from them.
`python -m bench.dequant` prints the table of all types.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bench.timing import Row
from diffharness.allocator import keep_freed_memory
from diffharness.engine.loading import load_ggml, load_llama
from diffharness.machine import usable_cores
from diffharness.weights import room
from diffharness.weights.dequant import BLOCKS, dequantize
from diffharness.weights.unpack import LAYOUTS, Unpack
from diffharness.weights.unpack.machine import compiled

WHOLE = (4096, 4096)  # 64 MiB of values, such as an attention matrix of an 8B model has
SHAPE = (32, 4096)  # 512 KiB of values
REPEATS = 32
LONGER = 8  # times, so that all threads are at work together
ROUNDS = 5
COMMON = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
HELD_AGAINST_C = ("Q4_K", "Q6_K", "Q8_0")

Bytes = NDArray[np.uint8]


def speed() -> list[Row]:
    """Seconds of ours over theirs."""
    rows = []
    for name in COMMON:
        whole = of_whole(name)
        rates = f"{whole['ours']:.0f} and {whole['gguf']:.0f} million values a second"
        if "gguf, tuned" in whole:
            rates += f" ({whole['gguf, tuned']:.0f} with our allocator's setting)"
        what = f"dequantize {name}, {WHOLE[0]} × {WHOLE[1]} / gguf-py in its own process, one core"
        rows.append(Row(what, whole["gguf"] / whole["ours"], 0.1, rates))
        if name in HELD_AGAINST_C:
            piece = of_piece(name)
            ours, theirs = piece["ours, all cores"], piece["ggml, all cores"]
            what = f"dequantize {name}, in cache / ggml's C, {usable_cores()} threads each"
            rows.append(Row(what, theirs / ours, 1.0, f"{ours:.0f} and {theirs:.0f} million values a second"))
    return rows


def of_whole(type_name: str) -> dict[str, float]:
    """Million values a second of a whole tensor on one core, the best of rounds in turn: what disturbs only slows."""
    best: dict[str, float] = {}
    with ExitStack() as stack:
        sides: dict[str, Callable[[], float]] = {"ours": partial(_ours_of_whole, type_name)}
        if has_library(type_name):
            for name, tune in (("gguf", None), ("gguf, tuned", keep_freed_memory)):
                other = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), tune))
                sides[name] = partial(_in_process, other, type_name)
        for _ in range(ROUNDS):
            for name, side in sides.items():
                best[name] = max(best.get(name, 0.0), side())
    return best


def _in_process(other: ProcessPoolExecutor, type_name: str) -> float:
    return other.submit(_gguf_py_of_whole, type_name).result()


def _ours_of_whole(type_name: str) -> float:
    stored = _stored(type_name)
    return _rate(lambda: dequantize(stored, type_name, WHOLE, threads=1))


def _gguf_py_of_whole(type_name: str) -> float:
    stored, kind = _stored(type_name), gguf.GGMLQuantizationType[type_name]
    with np.errstate(all="ignore"):
        return _rate(lambda: gguf.quants.dequantize(stored, kind))


@cache
def _stored(type_name: str) -> Bytes:
    block, size = BLOCKS[type_name]
    return np.random.default_rng(0).integers(0, 256, (WHOLE[0], WHOLE[1] // block * size), dtype=np.uint8)


def _rate(work: Callable[[], object]) -> float:
    begin = time.thread_time()
    work()
    return WHOLE[0] * WHOLE[1] / (time.thread_time() - begin) / 1e6


def of_piece(type_name: str) -> dict[str, float]:
    """Million values a second of each of a piece in cache, the best of rounds in turn."""
    block, size = BLOCKS[type_name]
    n_threads, n = usable_cores(), SHAPE[0] * SHAPE[1]
    random = np.random.default_rng(0)
    stored = [random.integers(0, 256, (n // block, size), dtype=np.uint8) for _ in range(n_threads)]
    values = [room.floats((n // block, block), "a piece") for _ in range(n_threads)]
    sides = {"ours": compiled(LAYOUTS[type_name], block, size), "ggml": ggml_routine(type_name)}
    best: dict[str, float] = {}

    def note(name: str, rate: float) -> None:
        best[name] = max(best.get(name, 0.0), rate)

    def rate(unpack: Unpack, times: int, i: int) -> float:
        begin = time.thread_time()
        for _ in range(times):
            unpack(stored[i], values[i])
        return times * n / (time.thread_time() - begin) / 1e6

    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(ROUNDS):
            for name, unpack in sides.items():
                note(name, rate(unpack, REPEATS, 0))
                note(f"{name}, all cores", sum(pool.map(partial(rate, unpack, LONGER * REPEATS), range(n_threads))))
    return best


def ggml_routine(type_name: str) -> Unpack:
    """ggml's own `dequantize_row_*`, of the library that the bindings use."""
    suffix = type_name.lower()
    if type_name.endswith("_K"):
        suffix = suffix[:-1] + "K"
    routine = getattr(_ggml(), f"dequantize_row_{suffix}")
    routine.restype, routine.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]

    def unpack(blocks: Bytes, out: NDArray[np.float32]) -> None:
        routine(blocks.ctypes.data, out.ctypes.data, out.size)

    return unpack


@cache
def _ggml() -> Any:
    return load_ggml(load_llama()).library


def has_library(type_name: str) -> bool:
    """Whether gguf-py dequantizes the type."""
    kind = gguf.GGMLQuantizationType[type_name]
    try:
        gguf.quants.dequantize(np.zeros((1, BLOCKS[type_name][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def main() -> None:
    keep_freed_memory()
    n = usable_cores()
    print(f"million values a second; {WHOLE[0]} × {WHOLE[1]} on one core, × is ours over gguf-py in its own process;")
    print(f"{SHAPE[0]} × {SHAPE[1]} in cache, on one core and on {n}")
    print(f"{'type':8}{'gguf-py':>9}{'tuned':>8}{'ours':>8}{'×':>7}", end="   ")
    print(f"{'C 1':>8}{f'C {n}':>8}{'ours 1':>8}{f'ours {n}':>8}")
    for name in LAYOUTS:
        whole, piece = of_whole(name), of_piece(name)
        gguf_py = whole.get("gguf", np.nan)
        columns = (gguf_py, whole.get("gguf, tuned", np.nan), whole["ours"])
        in_cache = (piece["ggml"], piece["ggml, all cores"], piece["ours"], piece["ours, all cores"])
        print(f"{name:8} " + "".join(f"{v:8.0f}" for v in columns) + f"{whole['ours'] / gguf_py:7.1f}", end="   ")
        print("".join(f"{v:8.0f}" for v in in_cache), flush=True)


if __name__ == "__main__":
    main()
