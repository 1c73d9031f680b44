"""A checkpoint as it would be after quantization by a recipe, without a file: each tensor is rounded as it is read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from diffharness.forensics.control import Quantize
from diffharness.forensics.recipes.blocks import round_to_blocks
from diffharness.forensics.recipes.plan import Plan
from diffharness.forensics.recipes.schema import PLAIN, IntN, name_of
from diffharness.weights.dequant import dequantize
from diffharness.weights.gguf_write import chunks_of_rows, encode_floats
from diffharness.weights.source import Float32Array, IntArray, TensorInfo, WeightSource


class Simulated:
    """`checkpoint` under `plan`, a WeightSource. Every scheme works row by row, so that `take` rounds only those rows.

    `quantize` is not called for F32, F16 and BF16. It has to stand two threads: the reference reads ahead.
    """

    def __init__(self, checkpoint: WeightSource, plan: Plan, quantize: Quantize) -> None:
        self._checkpoint, self._plan, self._quantize = checkpoint, plan, quantize
        self.label = f"{checkpoint.label}, {plan.recipe.name}"
        self.arch, self.metadata = checkpoint.arch, checkpoint.metadata
        self.tensors = {
            name: TensorInfo(name, tensor.info.shape, name_of(tensor.scheme), round(tensor.n_bits / 8))
            for name, tensor in plan.tensors.items()
        }

    def read(self, name: str) -> Float32Array:
        return self._rounded(name, self._checkpoint.read(name))

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self._rounded(name, self._checkpoint.take(name, rows))

    def encoded(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """The tensor's bytes in a GGUF, piece by piece; ValueError for a scheme that no GGUF holds."""
        scheme = self._plan.tensors[name].scheme
        if isinstance(scheme, IntN):
            raise ValueError(f"{name}: {name_of(scheme)} is simulated only")
        for values in chunks_of_rows(self._checkpoint, self._checkpoint.tensors[name]):
            yield self._encoded(values, scheme)

    def _rounded(self, name: str, values: Float32Array) -> Float32Array:
        scheme = self._plan.tensors[name].scheme
        if isinstance(scheme, IntN):
            return round_to_blocks(values, scheme)
        if scheme == "F32" or not values.size:
            return values
        return dequantize(self._encoded(values, scheme), scheme, values.shape, tensor=name)

    def _encoded(self, values: Float32Array, type_name: str) -> NDArray[np.uint8]:
        if type_name in PLAIN:
            return encode_floats(values, type_name)
        return self._quantize(values.reshape(-1, values.shape[-1]), type_name)
