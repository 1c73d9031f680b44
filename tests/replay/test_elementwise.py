from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffharness.replay.elementwise import gelu_plain
from tests.replay.ggml_graph import Graph, graph
from tests.replay.nodes import params, replay
from tests.replay.oracle import agrees, distance, nmse

RNG = np.random.default_rng(7)
X = RNG.standard_normal((2, 3, 5, 24)).astype(np.float32)


def x_of(g: Graph, type_name: str = "F32", scale: float = 1.0) -> int:
    return g.tensor((X * scale).astype(np.float32), type_name)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 24), (24,), (5, 1), (1, 3, 1, 24), (2, 1, 5, 8), (1,)])
def test_two_arguments_are_broadcast_by_repetition(op: str, shape: tuple[int, ...]) -> None:
    with graph() as g:
        agrees(g, getattr(g, op)(x_of(g), g.tensor(RNG.standard_normal(shape).astype(np.float32) + 3)))


@pytest.mark.parametrize("types", [("F16", "F16"), ("F16", "F32"), ("BF16", "BF16"), ("BF16", "F32")])
def test_two_arguments_of_other_types(types: tuple[str, str]) -> None:
    with graph() as g:
        agrees(g, g.mul(x_of(g, types[0]), x_of(g, types[1])))


UNARY = [
    *("abs", "sgn", "neg", "step", "tanh", "elu", "relu", "sigmoid", "gelu", "gelu_quick", "gelu_erf", "silu"),
    *("hardswish", "hardsigmoid", "exp", "expm1", "softplus", "floor", "ceil", "round", "trunc", "sqr", "sin", "cos"),
]


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("scale", [1.0, 12.0, 1e-3])
@pytest.mark.parametrize("op", UNARY)
def test_functions_of_one_value(op: str, scale: float, type_name: str) -> None:
    with graph() as g:
        agrees(g, getattr(g, op)(x_of(g, type_name, scale)), 1e-10 if type_name == "F32" else 1e-6)


@pytest.mark.parametrize("op", ["sqrt", "log"])
def test_functions_of_a_positive_value(op: str) -> None:
    with graph() as g:
        agrees(g, getattr(g, op)(g.tensor(np.abs(X))))


@pytest.mark.parametrize("op", ["gelu", "gelu_quick"])
def test_the_float16_table_entry_by_entry(op: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].astype(np.float32)
    with graph() as g:
        node = g.run(getattr(g, op)(g.tensor(finite)))
    ours, engine = (np.asarray(t).astype(np.float16).reshape(-1) for t in (replay(node), node.out.array()))
    apart = np.abs(_rank(ours) - _rank(engine))
    assert apart.max() <= 1
    assert (apart > 0).sum() <= 2


def _rank(halves: NDArray[np.float16]) -> NDArray[np.int64]:
    """The place of each number in the row of all, both zeros at one place."""
    bits = halves.view(np.uint16).astype(np.int64)
    return np.where(bits & 0x8000, -(bits & 0x7FFF), bits)


def test_gelu_of_float32_leaves_its_table_at_ten() -> None:
    x = np.array([-1e6, -10.0, -9.99, 9.99, 10.0, 10.001, 3e5], dtype=np.float32)
    with graph() as g:
        ours = replay(agrees(g, g.gelu(g.tensor(x)))).numpy().reshape(-1)
    assert ours[0] == ours[1] == 0 and ours[5] == x[5] and ours[6] == x[6]


def test_ops_with_parameters() -> None:
    with graph() as g:
        agrees(g, g.scale(x_of(g), 0.3))
        agrees(g, g.scale_bias(x_of(g), 0.3, -2.0))
        agrees(g, g.clamp(x_of(g), -0.5, 0.7))
        agrees(g, g.leaky_relu(x_of(g), 0.1, 0))
        agrees(g, g.xielu(x_of(g), 0.8, 0.9, 0.5, -1e-6))
        agrees(g, g.fill(x_of(g), 2.5))
        agrees(g, g.arange(1.0, 20.0, 0.7))


@pytest.mark.parametrize("op", ["sum", "sum_rows", "mean", "cumsum"])
def test_sums(op: str) -> None:
    with graph() as g:
        agrees(g, getattr(g, op)(x_of(g)))


def test_add1_and_add_id() -> None:
    ids = RNG.integers(0, 4, (5, 3)).astype(np.int32)
    bias = RNG.standard_normal((4, 24)).astype(np.float32)
    with graph() as g:
        agrees(g, g.add1(x_of(g), g.tensor(np.float32([1.5]))))
        agrees(g, g.add_id(g.tensor(X[0].transpose(1, 0, 2).copy()), g.tensor(bias), g.tensor(ids)))


def test_views_with_gaps_and_in_place() -> None:
    with graph() as g:
        part = g.view_3d(x_of(g), 16, 5, 3, 24 * 4, 5 * 24 * 4, 8 * 4)
        agrees(g, g.mul(part, g.tensor(X[0, 0, 0, :16])))
        agrees(g, g.silu(part))
        across = g.permute(x_of(g), 0, 2, 1, 3)
        agrees(g, g.add(across, g.tensor(RNG.standard_normal((5, 3, 24)).astype(np.float32))))
        agrees(g, g.mul(x_of(g), g.permute(g.tensor(RNG.standard_normal((24, 5)).astype(np.float32)), 1, 0, 2, 3)))
        agrees(g, g.add_inplace(x_of(g), g.tensor(X)))
        agrees(g, g.scale_inplace(x_of(g), 3.0))
        agrees(g, g.cumsum(g.view_2d(x_of(g), 7, 3, 24 * 4, 12)))


FAULTS = {
    "another scale": ("scale", (0.3,), params(0.3001, 0.0)),
    "a scale's bias lost": ("scale_bias", (0.3, 0.01), params(0.3, 0.0)),
    "another limit": ("clamp", (-0.5, 0.7), params(-0.5, 0.71)),
    "another slope": ("leaky_relu", (0.1, 0), params(0.11)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_constant_is_seen(fault: str) -> None:
    op, arguments, wrong = FAULTS[fault]
    with graph() as g:
        node = g.run(getattr(g, op)(x_of(g), *arguments))
    assert distance(node) <= 1e-10 < 1e-8 < distance(replace(node, params=wrong))


@pytest.mark.parametrize(
    ("op", "other"), [("gelu", "GELU_ERF"), ("gelu", "GELU_QUICK"), ("silu", "GELU"), ("add", "SUB")]
)
def test_another_function_is_seen(op: str, other: str) -> None:
    with graph() as g:
        node = g.run(getattr(g, op)(x_of(g), *([g.tensor(X + 1)] if op == "add" else [])))
    assert distance(node) <= 1e-10 < 1e-8 < distance(replace(node, op=other))


def test_gelu_computed_without_its_table_is_seen() -> None:
    with graph() as g:
        node = g.run(g.gelu(x_of(g)))
    plain = gelu_plain(torch.from_numpy(X)).numpy()
    assert nmse(plain.astype(np.float64), replay(node).double().numpy()) > 1e-9
