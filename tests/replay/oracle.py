"""A kernel held against ggml's own result for the same node."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.recorded import RecordedNode
from diffharness.replay.activation_quant import rounded
from tests.replay.ggml_graph import Graph
from tests.replay.nodes import replay

FLOOR = 1e-10  # NMSE of F32 results


def distance(node: RecordedNode) -> float:
    """NMSE of the engine's result against the replay's, rounded to the result's type; NaN and infinities must be at
    the same places, integers equal."""
    engine, ours = node.out.array(), replay(node)
    if engine.dtype.kind == "i":
        return 0.0 if np.array_equal(engine, ours.numpy()) else np.inf
    if node.out.type != "F32" and node.op != "SET_ROWS":  # which rounds the rows it writes, and those only
        ours = rounded(ours.float(), node.out.type)
    return nmse(np.asarray(engine, np.float64), ours.double().numpy())


def nmse(a: NDArray[Any], b: NDArray[Any]) -> float:
    odd = ~np.isfinite(b)
    if not np.array_equal(a[odd], b[odd], equal_nan=True) or not np.isfinite(a[~odd]).all():
        return np.inf
    a, b = a[~odd], b[~odd]
    error, energy = float(np.square(a - b).sum()), float(np.square(b).sum())
    return error / energy if energy else np.inf if error else 0.0


def agrees(g: Graph, address: int, limit: float = FLOOR, n_threads: int = 1) -> RecordedNode:
    """Run the op; its node, after its kernel was found to agree."""
    node = g.run(address, n_threads)
    found = distance(node)
    assert found <= limit, f"{node.op} {node.out.type} {node.out.shape}: NMSE {found:.2e}"
    return node
