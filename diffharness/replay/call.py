"""What a kernel is given: a recorded node, its sources as tensors, its parameters, and the file's weights.

Shapes are numpy's, slowest axis first, always four axes: ggml's [ne0, ne1, ne2, ne3] is [ne3, ne2, ne1, ne0] here, and
ggml's dimension `d` (of CONCAT, say) is axis `3 - d`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffharness.errors import DiffharnessError, EngineError
from diffharness.recorded import RecordedNode, Value
from diffharness.weights.dequant import BLOCKS
from diffharness.weights.source import WeightSource

_FLOATS = frozenset({"F32", "F16", "BF16", "F64"})


@dataclass(frozen=True)
class Call:
    """One node to be recomputed. `weights` are the file's tensors, dequantized by our own code."""

    node: RecordedNode
    weights: WeightSource

    def has(self, i: int) -> bool:
        """Whether the node has a source in slot i."""
        return i < len(self.node.sources) and self.node.sources[i] is not None

    def value(self, i: int) -> Value:
        """Source i as it was recorded; EngineError if the slot is empty, which the op does not allow."""
        value = self.node.sources[i] if i < len(self.node.sources) else None
        if value is None:
            raise EngineError(f"node {self.node.name} ({self.node.op}) has no source {i}")
        return value

    def x(self, i: int) -> Tensor:
        """Source i as float32 [ne3, ne2, ne1, ne0], a copy; a tensor of the file is read whole."""
        value = self.value(i)
        array = weight_array(value, self.weights) if value.is_weight else value.array()
        return torch.from_numpy(np.array(array, dtype=np.float32))

    def ints(self, i: int) -> Tensor:
        """Source i, which must hold integers, as int64 [ne3, ne2, ne1, ne0], a copy."""
        value = self.value(i)
        array = weight_array(value, self.weights) if value.is_weight else value.array()
        if value.type in _FLOATS or (BLOCKS.get(value.type, (1, 0))[0] > 1):
            raise EngineError(f"source {i} of {self.node.name} ({self.node.op}) holds {value.type}, not integers")
        return torch.from_numpy(np.array(array, dtype=np.int64))

    def f(self, i: int) -> float:
        """op_params[i], written there as a float32."""
        return float(self.node.params.view(np.float32)[i])

    def i(self, i: int) -> int:
        """op_params[i] as an int32."""
        return int(self.node.params[i])


class NoReplay(DiffharnessError):
    """Raised by a kernel for a variant of its op that it does not know; the node counts as not replayed."""


@dataclass(frozen=True)
class Partial:
    """An output of which only some values are defined; the others are not compared."""

    values: Tensor
    defined: Tensor  # bool, of the shape of `values`


@dataclass(frozen=True)
class Held:
    """An output that is as its type holds it already, and would not survive being rounded twice."""

    values: Tensor


Kernel = Callable[[Call], Tensor | Partial | Held]
"""A node's output, float32 or float64 (int64 of integer outputs), in any shape that reshapes to the node's own.

The driver rounds it to the type of the node's output. A MUL_MAT kernel must treat each row of source 1 by itself: the
driver hands it rows of several evaluations at once, so that a weight is dequantized only once."""


def weight_array(value: Value, weights: WeightSource) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A tensor of the file, or a view of one, as float32 of the node's own shape.

    EngineError if the file has no such tensor, or if the view reaches beyond its end.
    """
    info = weights.tensors.get(value.name)
    if info is None:
        raise EngineError(f"the engine's graph uses {value.name}, which the file does not have")
    flat = np.ascontiguousarray(weights.read(value.name)).reshape(-1)
    n_elements, n_bytes = BLOCKS.get(value.type, (1, 4))
    steps = [stride * n_elements // n_bytes for stride in value.strides[:3]]
    steps.append(1 if n_elements > 1 else value.strides[3] // n_bytes)
    first = value.offset * n_elements // n_bytes
    last = first + sum((n - 1) * step for n, step in zip(value.shape, steps, strict=True))
    if min(steps) < 0 or last >= flat.size:
        raise EngineError(f"the engine reads {value.name} to element {last}, the file has {flat.size}")
    strides = tuple(4 * step for step in steps)
    return np.lib.stride_tricks.as_strided(flat[first:], value.shape, strides, writeable=False)
