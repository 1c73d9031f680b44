"""A graph node as the engine computed it: its inputs before, its output after, and what it was told to do.

This is all that the replay knows of the engine. Shapes and strides are in numpy's order, slowest axis first: ggml's
`ne` and `nb` turned round, so that the last axis is the one along which quantized blocks lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffharness.errors import EngineError
from diffharness.weights.dequant import byte_size, dequantize

Path = Literal["batch", "single"]

PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class Value:
    """One tensor of a node.

    `raw` holds the bytes from the tensor's first to its last, gaps of a view included; None of a tensor of the model
    file, which the replay reads from the file itself.
    """

    name: str
    type: str  # F32, F16, Q4_K, I32, ...
    shape: tuple[int, int, int, int]  # ne, slowest first
    strides: tuple[int, int, int, int]  # nb in bytes, slowest first
    raw: NDArray[np.uint8] | None
    offset: int = 0  # of a view: bytes from the beginning of what it is a view of
    address: int = 0  # where it lay in the engine's memory

    @property
    def is_weight(self) -> bool:
        return self.raw is None

    def array(self) -> NDArray[Any]:
        """The values [shape]: float32 (also of BF16 and quantized types), float16 or integers; may view `raw`."""
        if self.raw is None:
            raise ValueError(f"{self.name} is a tensor of the file")
        if 0 in self.shape:
            return np.zeros(self.shape, dtype=PLAIN.get(self.type, np.dtype("<f4")))
        dtype = PLAIN.get(self.type)
        if dtype is not None:
            self._require(dtype.itemsize)
            return np.lib.stride_tricks.as_strided(
                self.raw[: dtype.itemsize].view(dtype), self.shape, self.strides, writeable=False
            )
        if self.type == "BF16":
            self._require(2)
            halves = np.lib.stride_tricks.as_strided(self.raw[:2].view("<u2"), self.shape, self.strides)
            return (halves.astype("<u4") << 16).view("<f4")
        n_row_bytes = byte_size(self.type, (self.shape[-1],))
        self._require(n_row_bytes, axes=3)
        rows = np.lib.stride_tricks.as_strided(
            self.raw, (*self.shape[:3], n_row_bytes), (*self.strides[:3], 1), writeable=False
        )
        return dequantize(np.ascontiguousarray(rows).reshape(-1), self.type, self.shape)

    def _require(self, last: int, axes: int = 4) -> None:
        """EngineError if an element that shape and strides name would lie outside of `raw`."""
        assert self.raw is not None
        end = sum((n - 1) * stride for n, stride in zip(self.shape[:axes], self.strides[:axes], strict=True)) + last
        if min(self.strides) < 0 or end > self.raw.size:
            raise EngineError(f"node value {self.name} of shape {self.shape} takes {end} bytes, {self.raw.size} came")


@dataclass(frozen=True)
class RecordedNode:
    """One node of one evaluation. Values are good until the next node is asked for."""

    index: int  # in its graph, from 0
    name: str
    op: str  # ggml_op_desc: MUL_MAT, ROPE, ...; of UNARY and GLU nodes the function: GELU, SWIGLU, ...
    params: NDArray[np.int32]  # op_params [16]; float parameters by `.view(np.float32)`
    out: Value
    sources: tuple[Value | None, ...]  # by slot of `src`, None where one is empty; as they were before the node ran
    path: Path  # a batch of tokens, or a single one
    row: int = 0  # of the fixture: the first token of the node's graph
    n_tokens: int = 0  # of its graph
    n_threads: int = 1  # that computed it
    evaluation: int = 0  # which one of the recording
    graph: int = 0  # which one of the evaluation: more than one where its tokens take several micro-batches
    occurrence: int = 0  # nodes of the same name and op that came before it in the graph
    is_view: bool = False  # computes nothing; its values hold no bytes
    computed: bool = True  # False of what the graph holds but does not need; its values hold no bytes
    on_host: bool = True  # False of what a device computed, whose arithmetic is its own
