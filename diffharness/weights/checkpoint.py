"""`Checkpoint`: a Hugging Face folder as a `WeightSource` in GGUF's names and layout.

`config.json` says which architecture it is; that architecture's `ArchMap` then says which tensors
there are, what each is made of and how its rows are arranged. A checkpoint with other tensors of the
text model than these is refused (`weights/unread.py`): it is not the model that would be computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from diffharness.errors import ArtifactFileError, CheckpointError
from diffharness.weights import names
from diffharness.weights.checkpoint_files import read_json, weight_files
from diffharness.weights.dequant import BLOCKS
from diffharness.weights.names._map import (
    AddOne,
    ArchMap,
    Layout,
    Packed,
    PaddedRows,
    Plain,
    RotaryPairs,
    Stack,
    TensorRule,
)
from diffharness.weights.safetensors_file import BYTES, SafetensorsFile, StoredTensor
from diffharness.weights.source import Float32Array, IntArray, Metadata, TensorInfo
from diffharness.weights.unread import second_heads, sort_out
from diffharness.words import are, counted, listed

# What reading a value of another type or size than a map expects comes to.
MALFORMED = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
_NAMED = 5  # so many tensors are named in a message
VOCABULARY = frozenset({"token_embd.weight", "output.weight", "per_layer_token_embd.weight"})  # a row a token
_SAME_SHAPE = (Plain, AddOne, RotaryPairs, PaddedRows)  # layouts that keep the shape


@dataclass(frozen=True)
class _Resolved:
    """A rule whose spelling was found: the Hugging Face tensors that make the tensor, and how."""

    rule: TensorRule
    parts: tuple[str, ...]
    layout: Layout


class Checkpoint:
    """The checkpoint in folder `path`. Raises CheckpointError for whatever is wrong with it.

    `n_vocab` leaves out rows of the vocabulary's tensors from there on: padding that converters cut off. `threads`
    are for converting large tensors, all usable cores where that is left open.
    """

    def __init__(self, path: str | Path, *, n_vocab: int | None = None, threads: int | None = None) -> None:
        self.path = Path(path)
        self.label = self.path.resolve().name
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path}: expected a folder with config.json and *.safetensors, found "
                + ("a file" if self.path.exists() else "nothing"),
                hint="give the folder of the Hugging Face model",
            )
        self.config = read_json(self.path / "config.json")
        self.map: ArchMap = names.for_config(self.config)
        self._metadata, rules = self._translate()
        self._files = [SafetensorsFile(file, threads=threads) for file in weight_files(self.path)]
        self._where: dict[str, SafetensorsFile] = {name: file for file in self._files for name in file.tensors}
        self._resolved = self._resolve(rules)
        used = {part for found in self._resolved.values() for part in found.parts}
        ignored = [*self.map.ignored]
        if "output.weight" not in self._resolved and len(parts := self._resolved["token_embd.weight"].parts) == 1:
            ignored += second_heads(self._where, used, parts[0])
        unread = sort_out(self._where, used, ignored)
        if unread.mattering:
            self._refuse(unread.mattering)
        self.ignored, self.extra = unread.ignored, unread.extra
        self._tensors = {name: self._info(found) for name, found in self._resolved.items()}
        self._cut: dict[str, int] = {}
        if n_vocab is not None:
            self._cut_vocabulary(n_vocab)
        self._sha256: str | None = None

    def _translate(self) -> tuple[dict[str, Any], list[TensorRule]]:
        try:
            metadata = self.map.metadata(self.config)
            return metadata, self.map.rules(metadata)
        except ArtifactFileError as error:  # a value that reads, but makes no model
            raise CheckpointError(f"{self.path / 'config.json'}: {error.message}", hint=error.hint) from error
        except MALFORMED as error:
            raise CheckpointError(
                f"{self.path / 'config.json'}: a value is not what a {self.map.arch} model has: "
                f"{type(error).__name__}: {error}",
                hint="compare config.json with the published one",
            ) from error

    def _refuse(self, unknown: list[str]) -> NoReturn:
        quantized = "quantization_config" in self.config
        raise CheckpointError(
            f"{self.label}: {counted(len(unknown), 'tensor is', 'tensors are')} not of the {self.map.arch} model that "
            f"config.json describes: {listed(unknown, _NAMED)}",
            hint="the checkpoint is quantized: give the one that it was made from"
            if quantized
            else "compare config.json with the published one; if it is right, this variant of the model is not "
            "supported: without --checkpoint the artifact is judged all the same",
        )

    def _cut_vocabulary(self, n_vocab: int) -> None:
        for name in VOCABULARY & self._tensors.keys():
            info = self._tensors[name]
            if info.shape[0] > n_vocab:
                n_bytes = info.n_bytes // info.shape[0] * n_vocab
                self._tensors[name] = TensorInfo(name, (n_vocab, *info.shape[1:]), info.type, n_bytes)
                self._cut[name] = n_vocab
        self._metadata |= {f"{self.arch}.vocab_size": n_vocab}

    # ── tensors ──────────────────────────────────────────────────────────────────────────────────

    def _resolve(self, rules: list[TensorRule]) -> dict[str, _Resolved]:
        resolved: dict[str, _Resolved] = {}
        missing = []
        for rule in rules:
            spellings = [(rule.hf, rule.layout), *rule.aliases] if rule.hf else list(rule.aliases)
            found = next(((parts, layout) for parts, layout in spellings if self._has(parts)), None)
            if found is not None:
                resolved[rule.name] = _Resolved(rule, *found)
                self._check_shape(resolved[rule.name])
            elif rule.values is not None:
                resolved[rule.name] = _Resolved(rule, (), rule.layout)
            elif rule.required:
                missing.append(next((part for part in rule.hf if part not in self._where), rule.name))
        if missing:
            raise CheckpointError(
                f"{self.label}: {counted(len(missing), 'tensor')} of a {self.map.arch} model {are(len(missing))} "
                f"missing: {listed(missing, _NAMED)}",
                hint="config.json and the weights are not of one model, or a shard is missing from the index",
            )
        return resolved

    def _has(self, parts: tuple[str, ...]) -> bool:
        return bool(parts) and all(part in self._where for part in parts)

    def _check_shape(self, found: _Resolved) -> None:
        wanted = found.rule.shape
        if isinstance(found.layout, Packed):
            self._check_packed(found, found.layout)
            return
        if isinstance(found.layout, PaddedRows):
            wanted = (found.layout.n_stored, *wanted[1:])
        expected = _squeezed(wanted[1:] if isinstance(found.layout, Stack) else wanted)
        for part in found.parts:
            stored = self._stored(part)
            if stored.dtype not in BLOCKS:
                raise CheckpointError(
                    f"{self.label}: tensor {part} has dtype {stored.dtype}, expected F32, F16 or BF16",
                    hint="give a checkpoint that is not quantized",
                )
            shape = stored.shape
            if isinstance(found.layout, (*_SAME_SHAPE, Stack)) and _squeezed(shape) != expected:
                raise CheckpointError(
                    f"{self.label}: tensor {part} has shape {shape}, expected {expected} by config.json",
                    hint="config.json and the weights are not of one model or size",
                )
        total = sum(int(np.prod(self._stored(part).shape)) for part in found.parts)
        if not isinstance(found.layout, (*_SAME_SHAPE, Stack)) and total < int(np.prod(wanted)):
            raise CheckpointError(
                f"{self.label}: {', '.join(found.parts)} have {total} elements, too few for {found.rule.name} {wanted}",
                hint="config.json and the weights are not of one model or size",
            )

    def _check_packed(self, found: _Resolved, layout: Packed) -> None:
        for part, shape in zip(found.parts, layout.shapes, strict=True):
            stored = self._stored(part)
            if (stored.dtype, stored.shape) != (BYTES, shape):
                raise CheckpointError(
                    f"{self.label}: tensor {part} is {stored.dtype} {stored.shape}, expected {BYTES} {shape} by "
                    "config.json",
                    hint="config.json and the weights are not of one model or size",
                )

    def _stored(self, part: str) -> StoredTensor:
        return self._where[part].tensors[part]

    def _info(self, found: _Resolved) -> TensorInfo:
        if not found.parts:
            n = int(np.prod(found.rule.shape))
            return TensorInfo(found.rule.name, tuple(found.rule.shape), "F32", 4 * n)
        stored = [self._stored(part) for part in found.parts]
        kind = found.layout.type if isinstance(found.layout, Packed) else stored[0].dtype
        return TensorInfo(found.rule.name, tuple(found.rule.shape), kind, sum(part.n_bytes for part in stored))

    # ── WeightSource ─────────────────────────────────────────────────────────────────────────────

    @property
    def arch(self) -> str:
        return self.map.arch

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> Float32Array:
        found = self._resolved[name]
        if name in self._cut:
            return self.take(name, slice(0, self._cut[name]))
        if not found.parts:
            return self._computed(found)
        parts = [self._read(found, part) for part in found.parts]
        return self._shaped(found, found.layout.to_gguf(parts), tuple(found.rule.shape))

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        found = self._resolved[name]
        n_rows = found.rule.shape[0]
        if isinstance(found.layout, Stack) and len(found.parts) == n_rows:
            experts = np.arange(n_rows)[rows]
            values = np.empty((len(experts), *found.rule.shape[1:]), dtype=np.float32)
            for i, expert in enumerate(experts):
                part = found.parts[int(expert)]
                values[i] = self._where[part].read(part).reshape(values.shape[1:])
            return values
        if isinstance(found.layout, PaddedRows):
            return self._padded(found, np.arange(n_rows)[rows])
        if self._is_rowwise(found):
            parts = [self._read(found, part, rows) for part in found.parts]
            taken = found.layout.to_gguf(parts)
            return self._shaped(found, taken, (parts[0].shape[0], *found.rule.shape[1:]))
        return np.ascontiguousarray(self.read(name)[rows])

    def _read(self, found: _Resolved, part: str, rows: slice | IntArray | None = None) -> Float32Array:
        file = self._where[part]
        return file.read_bytes(part, rows) if isinstance(found.layout, Packed) else file.read(part, rows)

    def by_rows(self, name: str) -> bool:
        """Whether `take` reads only what it is asked for; else it reads the whole tensor each time."""
        found = self._resolved[name]
        is_stack = isinstance(found.layout, Stack) and len(found.parts) == found.rule.shape[0]
        return is_stack or isinstance(found.layout, PaddedRows) or self._is_rowwise(found)

    def _padded(self, found: _Resolved, rows: IntArray) -> Float32Array:
        """Rows of a tensor of which the checkpoint has the first ones only."""
        [part] = found.parts
        values = np.zeros((len(rows), *found.rule.shape[1:]), dtype=np.float32)
        there = rows < self._stored(part).shape[0]
        values[there] = self._where[part].read(part, rows[there]).reshape(-1, *values.shape[1:])
        return values

    def _is_rowwise(self, found: _Resolved) -> bool:
        n_rows = found.rule.shape[0]
        return (
            found.layout.rowwise
            and bool(found.parts)
            and all(self._stored(p).shape[:1] == (n_rows,) for p in found.parts)
        )

    def _computed(self, found: _Resolved) -> Float32Array:
        values = found.rule.values
        if values is None:
            raise KeyError(found.rule.name)
        return self._shaped(found, values(), tuple(found.rule.shape))

    def _shaped(self, found: _Resolved, values: Float32Array, shape: tuple[int, ...]) -> Float32Array:
        if values.size != int(np.prod(shape)):
            raise CheckpointError(
                f"{self.label}: {found.rule.name} came out with shape {values.shape}, expected {shape}",
                hint="config.json and the weights are not of one model or size",
            )
        return np.ascontiguousarray(values.reshape(shape), dtype=np.float32)

    # ── beyond WeightSource ──────────────────────────────────────────────────────────────────────

    @property
    def tokenizer_path(self) -> Path | None:
        """`tokenizer.json`, where the folder has one."""
        path = self.path / "tokenizer.json"
        return path if path.is_file() else None

    @property
    def paths(self) -> list[Path]:
        """The weight files."""
        return [file.path for file in self._files]

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def sha256(self) -> str:
        """Hash of config.json's bytes and those of all weight files in order; computed once."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            for path in [self.path / "config.json", *self.paths]:
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            self._sha256 = digest.hexdigest()
        return self._sha256

    def close(self) -> None:
        for file in self._files:
            file.close()


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
