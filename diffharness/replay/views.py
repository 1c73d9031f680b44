"""Nodes that compute nothing: whether what they show lies where their op says, by shape, strides and address alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from diffharness.recorded import RecordedNode, Value


def misplaced(node: RecordedNode) -> str | None:
    """What is wrong with a RESHAPE, PERMUTE, TRANSPOSE or VIEW; None if nothing is, or if its source is not known."""
    source = node.sources[0] if node.sources else None
    if source is None or node.op not in _CHECKS or 0 in node.out.shape:
        return None
    offset, shape, strides = _CHECKS[node.op](node, source)
    found = (node.out.address - source.address, node.out.shape, node.out.strides)
    if found == (offset, shape, strides):
        return None
    return (
        f"expected shape {list(shape)} with strides {list(strides)} at byte {offset} of {source.name}, "
        f"found {list(found[1])} with {list(found[2])} at {found[0]}"
    )


Geometry = tuple[int, tuple[int, ...], tuple[int, ...]]  # byte offset in the source, shape, strides


def _reshape(node: RecordedNode, source: Value) -> Geometry:
    """The same elements in another shape, contiguous."""
    out = node.out
    if np.prod(out.shape) != np.prod(source.shape):
        return 0, source.shape, source.strides
    step, row = out.strides[3], source.strides[2] * out.shape[3] // max(1, source.shape[3])
    return 0, out.shape, (row * out.shape[1] * out.shape[2], row * out.shape[2], row, step)


def _permute(node: RecordedNode, source: Value) -> Geometry:
    """Axis i (fastest first) of the source becomes axis op_params[i]."""
    shape, strides = [1] * 4, [0] * 4
    for i in range(4):
        at = 3 - int(node.params[i])
        shape[at], strides[at] = source.shape[3 - i], source.strides[3 - i]
    return 0, tuple(shape), tuple(strides)


def _transpose(node: RecordedNode, source: Value) -> Geometry:
    a, b, c, d = source.shape
    s, t, u, v = source.strides
    return 0, (a, b, d, c), (s, t, v, u)


def _view(node: RecordedNode, source: Value) -> Geometry:
    """Any shape and strides, at the offset of op_params[0:2]."""
    return int(node.params[:2].view(np.uint64)[0]), node.out.shape, node.out.strides


_CHECKS: Mapping[str, Callable[[RecordedNode, Value], Geometry]] = {
    "RESHAPE": _reshape,
    "PERMUTE": _permute,
    "TRANSPOSE": _transpose,
    "VIEW": _view,
}
