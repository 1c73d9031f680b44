"""A slice's file: its tensors as F32 under the whole model's names and metadata, both cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffharness.engine.slices import ADDED_TO_INPUT, BY_VOCABULARY, INPUT_SCALE, LAYER, ROPE_FACTORS, Slice, cut
from diffharness.weights.gguf_file import GgufFile
from diffharness.weights.gguf_write import Bytes, write_gguf
from diffharness.weights.source import EMBEDDING, HEAD, Float32Array, IntArray, TensorInfo, WeightSource


def write_slice(source: WeightSource, gguf: GgufFile, out: Path, part: Slice, tokens: IntArray) -> None:
    """One slice as a GGUF file under `gguf`'s metadata. Raises OutputError if the disk is full.

    `tokens` are the ids of the whole model whose rows the slice has as its vocabulary, in that order, unless it has
    `part.rows` of the head.
    """
    arch = source.arch
    cut_source = _Cut(source, part, tokens)
    changes: dict[str, Any] = dict.fromkeys(key for key in gguf.metadata if key.startswith("tokenizer."))
    changes |= cut(gguf.metadata, part.first, part.stop)
    changes |= {"tokenizer.ggml.model": "no_vocab", f"{arch}.vocab_size": cut_source.n_vocab}
    if part.first:
        changes[f"{arch}.{INPUT_SCALE}"] = 1.0  # architectures without the key do not look for it
    write_gguf(out, cut_source, type_of=cut_source.type_of, kv_from=gguf, extra_metadata=changes)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a slice."""

    whole: str  # its name in the whole model
    rows: slice | IntArray | None = None  # None: all
    is_zero: bool = False


class _Cut:
    """A slice as a source of weights."""

    def __init__(self, source: WeightSource, part: Slice, tokens: IntArray) -> None:
        self._source, self.label, self.arch, self.metadata = source, source.label, source.arch, source.metadata
        vocabulary: slice | IntArray = tokens if part.rows is None else part.rows
        self.n_vocab = len(tokens) if part.rows is None else part.rows.stop - part.rows.start
        self._parts: dict[str, _Tensor] = {}
        for name in source.tensors:
            found = LAYER.fullmatch(name)
            if name in ROPE_FACTORS and not part.is_turned:
                continue
            if found:
                if part.first <= int(found["layer"]) < part.stop:
                    self._parts[f"blk.{int(found['layer']) - part.first}.{found['rest']}"] = _Tensor(name)
            elif name in BY_VOCABULARY:
                # beside a head of its own the embedding is not looked at: it is only there for its size
                unused = name == EMBEDDING and part.rows is not None and HEAD in source.tensors
                self._parts[name] = _Tensor(name, vocabulary, is_zero=unused)
            else:
                self._parts[name] = _Tensor(name, is_zero=name in ADDED_TO_INPUT and part.first > 0)
        self.tensors: dict[str, TensorInfo] = {name: self._info(name) for name in self._parts}
        raw: Callable[[str], Bytes] | None = getattr(source, "raw", None)
        if raw is not None:
            self.raw = lambda name: raw(self._parts[name].whole)  # asked for only where the type and shape stay

    def type_of(self, info: TensorInfo) -> str:
        return "F16" if self._parts[info.name].is_zero and len(info.shape) > 1 else "F32"

    def _info(self, name: str) -> TensorInfo:
        part = self._parts[name]
        info = self._source.tensors[part.whole]
        if part.rows is None and not part.is_zero:
            return TensorInfo(name, info.shape, info.type, info.n_bytes)
        shape = info.shape if part.rows is None else (self.n_vocab, *info.shape[1:])
        return TensorInfo(name, shape, "cut", 0)  # never the same type as what is written: nothing is copied raw

    def read(self, name: str) -> Float32Array:
        return self.take(name, slice(0, self.tensors[name].shape[0]))

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        part, shape = self._parts[name], self.tensors[name].shape
        if part.is_zero:
            return np.zeros((len(np.arange(shape[0])[rows]), *shape[1:]), dtype=np.float32)
        if part.rows is None:
            return self._source.take(part.whole, rows) if len(shape) > 1 else self._source.read(part.whole)[rows]
        if isinstance(part.rows, slice) and isinstance(rows, slice):
            return self._source.take(part.whole, slice(part.rows.start + rows.start, part.rows.start + rows.stop))
        chosen = np.arange(part.rows.start, part.rows.stop) if isinstance(part.rows, slice) else part.rows
        return self._source.take(part.whole, chosen[rows])
