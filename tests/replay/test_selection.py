from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffharness.recorded import RecordedNode
from diffharness.replay.choices import chosen
from tests.replay.ggml_graph import graph
from tests.replay.nodes import params, replay

RNG = np.random.default_rng(17)
X = RNG.standard_normal((2, 3, 40)).astype(np.float32)
TIED = np.round(X * 2) / 2


def wrong(node: RecordedNode) -> bool:
    theirs, ours, note = chosen(node, node.out.array(), replay(node).numpy())
    return note is not None or not np.array_equal(theirs, ours)


@pytest.mark.parametrize("values", [X, TIED], ids=["distinct", "tied"])
def test_sorting_and_choosing(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    with graph() as g:
        x = g.tensor(values.astype(np.float32))
        nodes = [g.argsort(x, order) for order in (0, 1)] + [g.top_k(x, k) for k in (1, 2, 7, 40)]
        nodes.append(g.argmax(g.tensor(values[0].astype(np.float32))))
        for node in nodes:
            assert not wrong(g.run(node))


def test_argmax_takes_the_last_of_equals() -> None:
    with graph() as g:
        node = g.run(g.argmax(g.tensor(np.float32([[1, 3, 0, 3], [2, 2, 2, 2]]))))
    assert replay(node).reshape(-1).tolist() == node.out.array().reshape(-1).tolist() == [3, 3]


def test_the_other_order_is_seen() -> None:
    with graph() as g:
        node = g.run(g.argsort(g.tensor(X), 1))
    assert wrong(replace(node, params=params(0)))


def test_the_smallest_instead_of_the_greatest_are_seen() -> None:
    with graph() as g:
        node = g.run(g.top_k(g.tensor(X), 5))
        negative = g.run(g.top_k(g.tensor(-X), 5))
    assert wrong(replace(node, out=negative.out))
