from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.replay.ggml_graph import Graph, graph
from tests.replay.nodes import params
from tests.replay.oracle import agrees, distance

RNG = np.random.default_rng(13)
BOTH = (RNG.standard_normal((2, 3, 5, 64)) * 3).astype(np.float32)
GATE, UP = BOTH[..., :32].copy(), BOTH[..., 32:].copy()

FUNCTIONS = ["reglu", "geglu", "swiglu", "geglu_erf", "geglu_quick"]
TYPES = pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])


def limit(type_name: str) -> float:
    return 1e-10 if type_name == "F32" else 1e-6


@TYPES
@pytest.mark.parametrize("form", ["", "_swapped"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_both_halves_in_one_tensor(function: str, form: str, type_name: str) -> None:
    with graph() as g:
        agrees(g, getattr(g, function + form)(g.tensor(BOTH, type_name)), limit(type_name))


@TYPES
@pytest.mark.parametrize("function", FUNCTIONS)
def test_two_tensors(function: str, type_name: str) -> None:
    with graph() as g:
        split = getattr(g, f"{function}_split")
        agrees(g, split(g.tensor(GATE, type_name), g.tensor(UP, type_name)), limit(type_name))


def test_views_of_wider_rows() -> None:
    with graph() as g:
        both = g.tensor(BOTH[0, 0])
        halves = (g.view_2d(both, 32, 5, 256, at) for at in (0, 128))
        agrees(g, g.swiglu_split(*halves))
        agrees(g, g.geglu(g.view_2d(both, 40, 5, 256, 16)))


def oai(g: Graph, alpha: float = 1.702, bound: float = 2.0) -> int:
    return g.swiglu_oai(g.tensor(GATE), g.tensor(UP), alpha, bound)


def test_clamped_units() -> None:
    with graph() as g:
        agrees(g, oai(g))
        agrees(g, g.swiglu_clamp(g.tensor(GATE), g.tensor(UP), 2.0))
        agrees(g, g.swiglu_clamp(g.tensor(GATE, "F16"), g.tensor(UP, "F16"), 2.0), 1e-6)


def test_gelu_of_large_gates() -> None:
    with graph() as g:
        agrees(g, g.geglu_split(g.tensor(GATE * 6), g.tensor(UP)))


def test_a_wrong_unit_is_seen() -> None:
    with graph() as g:
        node = g.run(g.geglu_split(g.tensor(GATE), g.tensor(UP)))
        joined = g.run(g.swiglu(g.tensor(BOTH)))
        clamped = g.run(oai(g))
        bounded = g.run(g.swiglu_clamp(g.tensor(GATE), g.tensor(UP), 2.0))
    wrong = {
        "gate and up exchanged": replace(node, sources=node.sources[::-1]),
        "the halves exchanged": replace(joined, params=params(2, 1)),
        "the erf form": replace(node, op="GEGLU_ERF"),
        "the quick form": replace(node, op="GEGLU_QUICK"),
        "SiLU": replace(node, op="SWIGLU"),
        "another alpha": replace(clamped, params=params(3, 0, 1.7, 2.0)),
        "another limit": replace(clamped, params=params(3, 0, 1.702, 2.1)),
        "up without its one": replace(clamped, op="SWIGLU_CLAMP"),
        "no limit": replace(bounded, op="SWIGLU"),
    }
    assert max(map(distance, (node, joined, clamped, bounded))) <= 1e-10
    found = {name: distance(each) for name, each in wrong.items()}
    assert min(found.values()) > 1e-8, found
