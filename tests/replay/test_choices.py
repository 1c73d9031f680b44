"""Indices are compared by what they choose."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from diffharness.replay.choices import chosen
from diffharness.replay.distance import distance
from tests.replay.nodes import node

X = np.array([[3.0, 1.0, 2.0, 2.0], [0.5, 0.25, 4.0, 0.0]], np.float32)
SORTED = np.array([[1, 2, 3, 0], [3, 1, 0, 2]], np.int32)


def far(op: str, engine: NDArray[np.int32], ours: NDArray[np.int32] = SORTED) -> tuple[float, str | None]:
    recorded = node(op, engine[None, None], X)
    a, b, note = chosen(recorded, recorded.out.array(), ours[None, None])
    return distance(a, b).nmse, note


def test_ties_are_free() -> None:
    assert far("ARGSORT", SORTED) == (0.0, None)
    assert far("ARGSORT", np.array([[1, 3, 2, 0], [3, 1, 0, 2]], np.int32)) == (0.0, None)


def test_another_order_matters_where_it_should() -> None:
    swapped = SORTED[:, [1, 0, 2, 3]]
    assert far("ARGSORT", swapped)[0] > 0.01
    assert far("TOP_K", swapped[:, :2], SORTED[:, :2]) == (0.0, None)
    assert far("TOP_K", swapped[:, 1:3], SORTED[:, :2])[0] > 0.01


@pytest.mark.parametrize(("index", "note"), [(4, "outside"), (-1, "outside"), (2, "twice")])
def test_an_index_that_is_none(index: int, note: str) -> None:
    wrong = SORTED.copy()
    wrong[0, 0] = index
    found = far("ARGSORT", wrong)
    assert found[0] == np.inf and note in (found[1] or "")


def test_argmax() -> None:
    recorded = node("ARGMAX", np.array([[[[0, 2]]]], np.int32), X)
    a, b, _ = chosen(recorded, recorded.out.array(), np.array([[[[0, 2]]]]))
    assert distance(a, b).nmse == 0.0
    a, b, _ = chosen(recorded, recorded.out.array(), np.array([[[[0, 0]]]]))
    assert distance(a, b).nmse > 0.1
