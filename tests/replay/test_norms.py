from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.replay.ggml_graph import Graph, graph
from tests.replay.nodes import params
from tests.replay.oracle import agrees, distance

RNG = np.random.default_rng(3)
X = (RNG.standard_normal((2, 6, 5, 48)) * RNG.lognormal(0, 2, (2, 6, 5, 1)) + 0.3).astype(np.float32)

NORMS = {"rms_norm": (1e-5,), "norm": (1e-5,), "l2_norm": (1e-6,), "group_norm": (4, 1e-6)}


def made(g: Graph, op: str, x: int | None = None, *arguments: float) -> int:
    return getattr(g, op)(g.tensor(X) if x is None else x, *(arguments or NORMS[op]))


@pytest.mark.parametrize("op", NORMS)
def test_norms(op: str) -> None:
    with graph() as g:
        agrees(g, made(g, op))
        agrees(g, made(g, op, g.tensor(X * 1e-3)))
        agrees(g, made(g, op, g.view_4d(g.tensor(X), 20, 5, 6, 2, 192, 960, 5760, 64)))


@pytest.mark.parametrize("op", ["rms_norm", "norm", "l2_norm"])
def test_norms_of_heads_in_permuted_order_and_in_place(op: str) -> None:
    with graph() as g:
        agrees(g, made(g, op, g.permute(g.tensor(X), 0, 2, 1, 3)))
        agrees(g, made(g, f"{op}_inplace", None, *NORMS[op]))


def test_norms_of_columns() -> None:
    with graph() as g:
        for op in ("norm", "l2_norm"):
            agrees(g, made(g, op, g.permute(g.tensor(X), 1, 0, 2, 3)))


def test_groups_that_do_not_divide_the_channels() -> None:
    with graph() as g:
        agrees(g, g.group_norm(g.tensor(X[:, :5].copy()), 2, 1e-5))


@pytest.mark.parametrize("op", NORMS)
def test_rows_of_zeros(op: str) -> None:
    with graph() as g:
        agrees(g, made(g, op, g.tensor(np.zeros((3, 8), np.float32)), *NORMS[op]))


WRONG = {"rms_norm": params(1e-6), "norm": params(1e-6), "l2_norm": params(1.0), "group_norm": params(2, 1e-6)}


@pytest.mark.parametrize("op", NORMS)
def test_another_eps_or_grouping_is_seen(op: str) -> None:
    with graph() as g:
        node = g.run(made(g, op, g.tensor((X * 1e-2).astype(np.float32))))
    assert distance(node) <= 1e-10 < 1e-9 < distance(replace(node, params=WRONG[op]))


@pytest.mark.parametrize(("op", "other"), [("rms_norm", "NORM"), ("norm", "RMS_NORM"), ("rms_norm", "L2_NORM")])
def test_another_norm_is_seen(op: str, other: str) -> None:
    with graph() as g:
        node = g.run(made(g, op))
    assert distance(replace(node, op=other)) > 1e-4
