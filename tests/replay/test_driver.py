"""The driver on nodes made by hand: clean ones are at zero, each planted fault is seen, nothing is passed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffharness.errors import EngineError
from diffharness.recorded import RecordedNode, Value
from diffharness.replay import driver
from diffharness.replay.call import Call, NoReplay, Partial
from diffharness.replay.driver import Outcome, arithmetic_type, replay
from tests.replay.nodes import NoWeights, four, node, value, weight

RNG = np.random.default_rng(2)
W = RNG.standard_normal((6, 8)).astype(np.float32)
X = RNG.standard_normal((5, 8)).astype(np.float32)


class Counting(NoWeights):
    """Counts how often tensors are read."""

    n_reads = 0

    def read(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        self.n_reads += 1
        return super().read(name)


def double(call: Call) -> Tensor:
    return 2 * call.x(0)


def product(call: Call) -> Tensor:
    return call.x(1) @ call.x(0)[0, 0].T


def first_half(call: Call) -> Partial:
    x = call.x(0)
    return Partial(2 * x, torch.arange(x.shape[-1]) < x.shape[-1] // 2)


def refuses(call: Call) -> Tensor:
    raise NoReplay("mode 9 is not known")


KERNELS = {"DOUBLE": double, "MUL_MAT": product, "HALF": first_half, "REFUSES": refuses}


def run(nodes: Sequence[RecordedNode], weights: NoWeights | None = None) -> Outcome:
    return replay(iter(nodes), weights or NoWeights(w=W), KERNELS)


def product_node(rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any] | None = None, **more: Any) -> RecordedNode:
    made = node("MUL_MAT", rows @ W.T if out is None else out, weight("w", W.shape), rows, **more)
    return replace(made, n_tokens=len(rows))


def altered(recorded: RecordedNode, factor: float = 1.01, row: int = 0) -> RecordedNode:
    out = np.array(recorded.out.array())
    out[0, 0, row] *= factor
    return replace(recorded, out=value(out, recorded.out.name))


def test_a_clean_node_is_at_zero_and_a_wrong_row_is_found() -> None:
    clean = node("DOUBLE", 2 * X, X)
    found = run([clean, altered(clean, row=3)]).replayed
    assert [each.distance.nmse for each in found] == [0.0, pytest.approx(found[1].distance.nmse)]
    assert found[1].distance.worst_row == 3 and found[1].distance.worst_row_nmse == pytest.approx(1e-4, rel=0.1)


def test_a_wrong_source_is_a_wrong_node() -> None:
    assert run([node("DOUBLE", 2 * X, X + 1)]).replayed[0].distance.nmse > 0.1


def test_nothing_is_passed_over() -> None:
    unknown = node("NEW_OP", X.shape, X)
    nodes = [
        unknown,
        unknown,
        node("REFUSES", X.shape, X),
        replace(unknown, computed=False),
        node("DOUBLE", (0, 4), np.zeros((0, 4), np.float32)),
        replace(node("DOUBLE", 2 * X, X), on_host=False),
        replace(node("VIEW", X.shape, X), is_view=True),
    ]
    found = run(nodes)
    assert found.without == {"NEW_OP": 2, "REFUSES": 1, "DOUBLE": 1} and found.n_nodes == 7
    assert "mode 9" in found.refused["REFUSES"] and "device" in found.refused["DOUBLE"]
    assert (found.n_not_computed, found.n_empty, found.n_views) == (1, 1, 1)


def test_a_misplaced_view_is_infinitely_wrong() -> None:
    source = value(X, "x")
    shown = Value("t", "F32", four((8, 5)), (160, 160, 32, 4), np.empty(0, np.uint8))
    found = run([replace(node("TRANSPOSE", shown, source), is_view=True)]).replayed
    assert found[0].distance.nmse == np.inf and found[0].note is not None


def test_the_output_is_rounded_to_its_own_type() -> None:
    half = (2 * X).astype(np.float16)
    assert run([node("DOUBLE", half, X)]).replayed[0].distance.nmse == 0.0
    assert run([node("DOUBLE", half + np.float16(0.01), X)]).replayed[0].distance.nmse > 1e-6


def test_only_what_is_defined_is_compared() -> None:
    out = 2 * X
    out[:, 4:] = 99
    assert run([node("HALF", out, X)]).replayed[0].distance.nmse == 0.0
    out[1, 3] = 99
    assert run([node("HALF", out, X)]).replayed[0].distance.nmse > 1


def test_a_weight_is_read_once_for_single_tokens_and_batch() -> None:
    alone = [replace(product_node(X[i : i + 1], path="single"), evaluation=i, index=4) for i in range(2)]
    batch = replace(product_node(X), evaluation=2, index=4)
    weights = Counting(w=W)
    found = run([*alone, batch], weights).replayed
    assert weights.n_reads == 1 and [each.node.path for each in found] == ["batch", "single", "single"]
    assert all(each.distance.nmse < 1e-13 for each in found) and [each.weight for each in found] == ["w"] * 3


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_fault_in_one_of_the_joined_is_found_there(at: int) -> None:
    nodes = [replace(product_node(X[i : i + 1], path="single"), evaluation=i) for i in range(2)]
    nodes.append(replace(product_node(X), evaluation=2))
    nodes[at] = altered(nodes[at])
    found = {each.node.evaluation: each.distance.nmse for each in run(nodes).replayed}
    assert found.pop(at) > 1e-6 and all(nmse < 1e-13 for nmse in found.values())


def test_single_tokens_without_a_batch_are_replayed_too() -> None:
    nodes = [replace(product_node(X[i : i + 1], path="single"), evaluation=i) for i in range(3)]
    assert len(run(nodes).replayed) == 3


def test_only_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_WAITING", 150)  # bytes: three rows of 8 + 6 values are more
    nodes = [replace(product_node(X[i : i + 1], path="single"), evaluation=i) for i in range(5)]
    weights = Counting(w=W)
    assert len(run(nodes, weights).replayed) == 5 and weights.n_reads == 2


def test_values_are_kept_while_they_wait() -> None:
    """The recorder's memory is used again."""
    row = X[:1].copy()
    waiting = product_node(row, path="single")
    raw = np.array(waiting.sources[1].raw)  # type: ignore[union-attr]
    shared = replace(waiting, sources=(waiting.sources[0], replace(waiting.sources[1], raw=raw)))  # type: ignore[type-var]

    def nodes() -> Any:
        yield shared
        raw[:] = 0
        yield product_node(X)

    found = replay(nodes(), NoWeights(w=W), KERNELS).replayed
    assert all(each.distance.nmse < 1e-13 for each in found)


def test_a_graph_that_changes_is_told() -> None:
    def graph(evaluation: int, *names: str) -> list[RecordedNode]:
        made = [node("DOUBLE", 2 * X[:1], X[:1], name=name, path="single") for name in names]
        return [replace(each, evaluation=evaluation, index=i, n_tokens=1) for i, each in enumerate(made)]

    assert run([*graph(0, "a", "b"), *graph(1, "a", "b")]).changed == []
    changed = run([*graph(0, "a", "b"), *graph(1, "a", "c"), *graph(2, "a", "d")]).changed
    assert len(changed) == 2 and "node 1 was b" in changed[0]
    assert "and then no node" in run([*graph(0, "a", "b"), *graph(1, "a")]).changed[0]
    assert "no node" in run([*graph(0, "a"), *graph(1, "a", "b")]).changed[0]


def test_a_kernel_of_another_shape_is_an_error() -> None:
    with pytest.raises(EngineError, match="the node"):
        run([node("DOUBLE", X[:2], X)])


def test_which_type_decides() -> None:
    half = X.astype(np.float16)
    ids = np.zeros((1, 1), np.int32)
    assert arithmetic_type(node("ADD", X, X, X)) == "F32"
    assert arithmetic_type(node("CPY", half, X)) == "F16"
    assert arithmetic_type(node("FLASH_ATTN_EXT", X, X, half, half)) == "F16"
    assert arithmetic_type(node("GET_ROWS", X, weight("w", (6, 32), "Q4_K"), ids)) == "Q4_K"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_was_given_values_that_are_not_finite_is_not_accused(bad: float) -> None:
    x = X.copy()
    x[2, 3] = bad
    found = run([node("DOUBLE", np.zeros_like(x), x)])
    assert not found.replayed and found.without["DOUBLE"] == 1 and "not finite" in found.refused["DOUBLE"]
    made_here = 2 * X
    made_here[2, 3] = bad
    assert run([node("DOUBLE", made_here, X)]).replayed[0].distance.nmse == np.inf
    assert run([node("DOUBLE", 2 * x, x)]).replayed[0].distance.nmse == 0
