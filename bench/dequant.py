"""Dequantization of every type: against gguf-py on one core, against ggml's C routines on one and on all cores.

A piece that fits the second-level cache, again and again, so that the processor is measured and not memory:
of a large tensor, ours and the fastest of C's routines take as long as its bytes need to be written. Counted is the
time that the threads' processors spent, not what other programs took from them.
`python -m bench.dequant` prints the table of all types.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bench.timing import Row
from diffharness.engine.loading import load_ggml, load_llama
from diffharness.machine import usable_cores
from diffharness.weights.dequant import BLOCKS
from diffharness.weights.unpack import LAYOUTS, Unpack
from diffharness.weights.unpack.machine import compiled

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
        found = measure(name)
        rates = f"{found['ours']:.0f} and {found['gguf']:.0f} million values a second"
        rows.append(Row(f"dequantize {name} / gguf-py, one core", found["gguf"] / found["ours"], 0.1, rates))
        if name in HELD_AGAINST_C:
            ours, theirs = found["ours, all cores"], found["ggml, all cores"]
            what = f"dequantize {name} / ggml's C, {usable_cores()} threads each"
            rows.append(Row(what, theirs / ours, 1.0, f"{ours:.0f} and {theirs:.0f} million values a second"))
    return rows


def measure(type_name: str) -> dict[str, float]:
    """Million values a second of each, the best of rounds in turn: what disturbs only ever slows down."""
    block, size = BLOCKS[type_name]
    n_threads, n = usable_cores(), SHAPE[0] * SHAPE[1]
    random = np.random.default_rng(0)
    stored = [random.integers(0, 256, (n // block, size), dtype=np.uint8) for _ in range(n_threads)]
    values = [np.zeros((n // block, block), np.float32) for _ in range(n_threads)]
    sides = {"ours": compiled(LAYOUTS[type_name], block, size), "ggml": ggml_routine(type_name)}
    best: dict[str, float] = {}

    def note(name: str, rate: float) -> None:
        best[name] = max(best.get(name, 0.0), rate)

    def rate(unpack: Unpack, times: int, i: int) -> float:
        begin = time.thread_time()
        for _ in range(times):
            unpack(stored[i], values[i])
        return times * n / (time.thread_time() - begin) / 1e6

    with ThreadPoolExecutor(n_threads) as pool, np.errstate(all="ignore"):
        for _ in range(ROUNDS):
            for name, unpack in sides.items():
                note(name, rate(unpack, REPEATS, 0))
                note(f"{name}, all cores", sum(pool.map(partial(rate, unpack, LONGER * REPEATS), range(n_threads))))
            if has_library(type_name):
                note("gguf", rate(partial(_by_gguf_py, gguf.GGMLQuantizationType[type_name]), REPEATS // 4, 0))
    return best


def _by_gguf_py(kind: gguf.GGMLQuantizationType, blocks: Bytes, out: NDArray[np.float32]) -> None:
    gguf.quants.dequantize(blocks.reshape(SHAPE[0], -1), kind)


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
    n = usable_cores()
    print(f"million values a second, {SHAPE[0]} × {SHAPE[1]} in cache; × is ours over gguf-py, one core each")
    print(f"{'type':8}{'gguf-py':>9}{'C 1':>8}{f'C {n}':>8}{'ours 1':>8}{f'ours {n}':>8}{'×':>7}")
    for name in LAYOUTS:
        found = measure(name)
        gguf_py = found.get("gguf", np.nan)
        columns = (found["ggml"], found["ggml, all cores"], found["ours"], found["ours, all cores"])
        print(f"{name:8}{gguf_py:9.0f}" + "".join(f"{v:8.0f}" for v in columns) + f"{found['ours'] / gguf_py:7.1f}")


if __name__ == "__main__":
    main()
