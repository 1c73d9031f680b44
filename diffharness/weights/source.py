"""`WeightSource`: one model's tensors and metadata, in GGUF names and GGUF layout.

Every source speaks the artifact's language, so that the reference, the comparison of tensors and
an overlay of two sources need no knowledge of where a weight came from. A Hugging Face checkpoint
is translated on reading (`weights.names`): norm offsets are added, Q/K rows permuted for llama,
experts stacked. Shapes are numpy's, outermost axis first: a matrix is [out, in], an expert stack
[n_expert, out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
IntArray = NDArray[np.int64]
Metadata = Mapping[str, Any]  # GGUF keys -> int | float | bool | str | list of those

EMBEDDING, HEAD = "token_embd.weight", "output.weight"  # a model without the latter uses the former for both


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    name: str  # GGUF name, such as `blk.3.attn_q.weight`
    shape: tuple[int, ...]  # numpy order
    type: str  # ggml's type name: F32, BF16, Q4_K, ...
    n_bytes: int  # as stored

    @property
    def n_elements(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


class WeightSource(Protocol):
    """Tensors and metadata of one model; never the whole model in memory."""

    @property
    def label(self) -> str:
        """A short name for messages, such as the file's name."""
        ...

    @property
    def arch(self) -> str:
        """`general.architecture`."""
        ...

    @property
    def metadata(self) -> Metadata:
        """GGUF keys, also for a checkpoint (translated from config.json)."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its GGUF name."""
        ...

    def read(self, name: str) -> Float32Array:
        """The whole tensor, dequantized; KeyError if there is none of that name."""
        ...

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        """Rows (or experts) `rows` of the first axis, dequantized, without reading the others."""
        ...


class Overlay:
    """`base` with some tensors, or its metadata, taken from elsewhere.

    `choose(name)` says whether the tensor comes from `top`; `metadata`, where given, is the whole metadata.
    """

    def __init__(
        self,
        base: WeightSource,
        top: WeightSource | None = None,
        choose: Callable[[str], bool] = lambda name: False,
        metadata: Metadata | None = None,
        label: str | None = None,
    ) -> None:
        self._base, self._top, self._choose = base, top, choose
        self.arch = base.arch
        self.metadata = base.metadata if metadata is None else metadata
        self.label = label or (f"{base.label} + {top.label}" if top else base.label)
        infos = dict(base.tensors)
        if top is not None:
            infos.update({name: info for name, info in top.tensors.items() if choose(name)})
        self.tensors: Mapping[str, TensorInfo] = infos

    def _source(self, name: str) -> WeightSource:
        if self._top is not None and name in self._top.tensors and self._choose(name):
            return self._top
        return self._base

    def read(self, name: str) -> Float32Array:
        return self._source(name).read(name)

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self._source(name).take(name, rows)
