"""`Control`: the checkpoint as it would be in the artifact's types, quantized afresh by ggml's own quantizer.

What a type loses anyway is read off it. Nothing is written: each tensor, or the rows that are asked
for, is quantized and dequantized on demand. Importance weights are not known, so every column counts alike.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from diffharness.weights.dequant import byte_size, dequantize
from diffharness.weights.source import Float32Array, IntArray, TensorInfo, WeightSource


class Quantize(Protocol):
    """Float32 rows [n, width] to the bytes [n, bytes of a row] of a type, as `engine.quantizer.Quantizer.quantize`."""

    def __call__(
        self, rows: Float32Array, type_name: str, importance: Float32Array | None = None
    ) -> NDArray[np.uint8]: ...


class Control:
    """A WeightSource: the checkpoint's tensors, each in the type that the artifact keeps it in.

    Tensors that the artifact lacks, or has in another shape, stay as they are. Metadata are the
    checkpoint's. Reading raises what `quantize` raises: EngineError where ggml does not make a type.
    """

    def __init__(self, checkpoint: WeightSource, artifact: WeightSource, quantize: Quantize) -> None:
        self.label = f"{checkpoint.label} quantized like {artifact.label}"
        self._checkpoint, self._quantize = checkpoint, quantize
        self.arch, self.metadata = checkpoint.arch, checkpoint.metadata
        self.tensors = {name: _info(info, artifact.tensors.get(name)) for name, info in checkpoint.tensors.items()}

    def read(self, name: str) -> Float32Array:
        return self._again(name, self._checkpoint.read(name))

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        if len(self.tensors[name].shape) < 2:
            return np.ascontiguousarray(self.read(name)[rows])
        return self._again(name, self._checkpoint.take(name, rows))

    def _again(self, name: str, values: Float32Array) -> Float32Array:
        type_name = self.tensors[name].type
        return values if type_name == self._checkpoint.tensors[name].type else self.again(values, type_name)

    def again(self, values: Float32Array, type_name: str) -> Float32Array:
        """`values` [..., width] after storage in that type. NaN and infinity, which no type keeps, become 0."""
        if not values.size:
            return values
        rows = values.reshape(-1, values.shape[-1])
        if not np.isfinite(rows).all():
            rows = np.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)
        return dequantize(self._quantize(rows, type_name), type_name, values.shape)


def _info(own: TensorInfo, like: TensorInfo | None) -> TensorInfo:
    if like is None or like.shape != own.shape or like.type == own.type:
        return own
    return TensorInfo(own.name, own.shape, like.type, byte_size(like.type, own.shape))
