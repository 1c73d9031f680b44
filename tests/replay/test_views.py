"""Views are where their op says, and a misplaced one is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffharness.recorded import RecordedNode, Value
from diffharness.replay.views import misplaced
from tests.replay.nodes import node, params, value

X = value(np.zeros((2, 3, 4, 5), np.float32))
SOURCE = replace(X, address=1000, name="x")


def view(op: str, shape: tuple[int, ...], strides: tuple[int, ...], at: int = 0, *told: int) -> RecordedNode:
    out = Value("out", "F32", shape, strides, np.empty(0, np.uint8), address=1000 + at)  # type: ignore[arg-type]
    return replace(node(op, out, SOURCE, op_params=params(*told)), is_view=True)


CLEAN = {
    "RESHAPE": view("RESHAPE", (1, 6, 10, 2), (480, 80, 8, 4)),
    "PERMUTE": view("PERMUTE", (2, 4, 3, 5), (240, 20, 80, 4), 0, 0, 2, 1, 3),
    "TRANSPOSE": view("TRANSPOSE", (2, 3, 5, 4), (240, 80, 4, 20)),
    "VIEW": view("VIEW", (1, 1, 4, 3), (240, 80, 20, 4), 88, 88),
}


@pytest.mark.parametrize("op", CLEAN)
def test_a_clean_one(op: str) -> None:
    assert misplaced(CLEAN[op]) is None


@pytest.mark.parametrize("op", CLEAN)
def test_a_shifted_one(op: str) -> None:
    wrong = replace(CLEAN[op], out=replace(CLEAN[op].out, address=CLEAN[op].out.address + 4))
    assert "found" in (misplaced(wrong) or "")


@pytest.mark.parametrize("op", ["RESHAPE", "PERMUTE", "TRANSPOSE"])
def test_other_strides(op: str) -> None:
    a, b, c, d = CLEAN[op].out.strides
    wrong = replace(CLEAN[op], out=replace(CLEAN[op].out, strides=(a, c, b, d)))
    assert misplaced(wrong) is not None


def test_another_number_of_elements() -> None:
    assert misplaced(view("RESHAPE", (1, 6, 9, 2), (432, 72, 8, 4))) is not None


def test_what_is_not_known_is_not_accused() -> None:
    assert misplaced(node("NONE", (1, 1, 1, 4))) is None
    assert misplaced(view("RESHAPE", (0, 6, 10, 2), (0, 80, 8, 4))) is None
