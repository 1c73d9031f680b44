"""Faults on bytes touch as many bits and blocks as they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffharness.damage import Damage
from diffharness.weights.dequant import BLOCKS, SCALES
from diffharness.weights.gguf_file import open_gguf
from tests.damage.conftest import raws, values

Make = Callable[..., Damage]
NAMES = {"Q4_K": "blk.1.attn_q.weight", "Q4_0": "blk.1.ffn_down.weight", "F16": "blk.1.ffn_up.weight"}


def both(model: Path, done: Damage, name: str) -> tuple[np.ndarray, np.ndarray]:
    a, b = raws(model)[name], raws(done.out)[name]
    with open_gguf(model) as file:
        size = BLOCKS[file.tensors[name].type][1]
    size *= 32 if size == 2 else 1
    return (np.frombuffer(x, dtype=np.uint8).reshape(-1, size) for x in (a, b))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", NAMES)
def test_bits(model: Path, damaged: Make, kind: str) -> None:
    a, b = both(model, damaged("bit-flips:11", tensors=NAMES[kind]), NAMES[kind])
    assert np.unpackbits(a ^ b).sum() == 11


@pytest.mark.parametrize("kind", NAMES)
def test_zero_blocks(model: Path, damaged: Make, kind: str) -> None:
    done = damaged("zero-blocks:0.05", tensors=NAMES[kind])
    a, b = both(model, done, NAMES[kind])
    hit = (a != b).any(axis=1)
    assert hit.sum() == round(0.05 * len(a)) and (b[hit] == 0).all()
    size = 32 if kind != "Q4_K" else 256
    assert (values(done.out)[NAMES[kind]].reshape(-1, size)[hit] == 0).all()


@pytest.mark.parametrize("kind", ["Q4_K", "Q4_0"])
@pytest.mark.parametrize("how", ["garbled-blocks", "wrong-scales", "double-scales"])
def test_scales_or_all_but_scales(model: Path, damaged: Make, kind: str, how: str) -> None:
    a, b = both(model, damaged(f"{how}:0.1", tensors=NAMES[kind]), NAMES[kind])
    columns = np.zeros(a.shape[1], dtype=bool)
    for at in SCALES[kind]:
        columns[at : at + 2] = True
    touched = (a != b).any(axis=0)
    assert touched.any() and not touched[columns if how == "garbled-blocks" else ~columns].any()
    assert (a != b).any(axis=1).sum() == pytest.approx(0.1 * len(a), rel=0.1)


@pytest.mark.parametrize("kind", NAMES)
def test_nan(model: Path, damaged: Make, kind: str) -> None:
    found = values(damaged("nan-block:2", tensors=NAMES[kind]).out)[NAMES[kind]]
    assert np.isnan(found).sum() == 2 * (256 if kind == "Q4_K" else 32)


def test_shift(model: Path, damaged: Make) -> None:
    name = NAMES["Q4_0"]
    done = damaged("byte-shift:3", tensors=name)
    assert raws(done.out)[name][3:] == raws(model)[name][:-3]
