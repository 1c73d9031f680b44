"""One safetensors file, memory-mapped: names, shapes, and rows as float32.

The safetensors library checks the header (sizes, offsets, overlaps) when the file is opened; the
bytes are then read here, because its numpy side has no bfloat16 and cannot skip converting.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from diffharness.errors import CheckpointError
from diffharness.weights import pread
from diffharness.weights.dequant import BLOCKS, dequantize
from diffharness.weights.source import Float32Array, IntArray

BYTES = "U8"  # safetensors' name of the type
_LARGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the checkpoint has it; `dtype` is safetensors' name, which ggml shares for floats."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int  # absolute in the file
    n_bytes: int


class SafetensorsFile:
    """Raises CheckpointError for a file that is not sound. `threads` are for converting large tensors."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path, self._threads = path, threads
        try:
            with safe_open(str(path), framework="numpy"):
                pass
            self._file = path.open("rb")
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file", hint="download the missing file") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: expected a whole safetensors file, found one that cannot be read: {error}",
                hint="the file is damaged, cut off or a Git LFS pointer: compare its size and download it again",
            ) from error
        self.tensors = self._header()

    def _header(self) -> dict[str, StoredTensor]:
        # The library has checked every size and offset; read the same header again for the offsets.
        length = int.from_bytes(self._map[:8], "little")
        if length > min(_LARGEST_HEADER, len(self._map) - 8):
            raise CheckpointError(f"{self.path}: expected a header of at most {len(self._map) - 8} bytes, got {length}")
        header: dict[str, Any] = json.loads(self._map[8 : 8 + length])
        header.pop("__metadata__", None)
        return {
            name: StoredTensor(
                name,
                tuple(entry["shape"]),
                entry["dtype"],
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }

    def read(self, name: str, rows: slice | IntArray | None = None) -> Float32Array:
        """The tensor, or some rows of its first axis, as float32."""
        stored = self.tensors[name]
        if stored.dtype not in BLOCKS:
            raise CheckpointError(
                f"{self.path.name}: tensor {name} has dtype {stored.dtype}, expected F32, F16 or BF16",
                hint="give a checkpoint that is not quantized",
            )
        if stored.dtype == "F32" and pread.AVAILABLE and stored.shape:
            part = pread.contiguous(slice(None) if rows is None else rows, stored.shape[0])
            if part is not None:
                return self._floats(stored, *part)
        raw, shape = self._raw(stored, rows)
        values = dequantize(raw, stored.dtype, shape, threads=self._threads)
        self._release(stored, raw.nbytes)
        return values

    def read_bytes(self, name: str, rows: slice | IntArray | None = None) -> Float32Array:
        """A tensor of bytes, or some rows of its first axis, as float32."""
        raw, shape = self._raw(self.tensors[name], rows)
        return raw.astype(np.float32).reshape(shape)

    def _raw(self, stored: StoredTensor, rows: slice | IntArray | None) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
        """Stored bytes, and the shape of the values that they are."""
        raw: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8, count=stored.n_bytes, offset=stored.start)
        if rows is None:
            return raw, stored.shape
        raw = np.ascontiguousarray(raw.reshape(stored.shape[0], -1)[rows])
        return raw, (raw.shape[0], *stored.shape[1:])

    def _floats(self, stored: StoredTensor, first: int, n_rows: int) -> Float32Array:
        row_bytes = stored.n_bytes // max(1, stored.shape[0])
        try:
            shape = (n_rows, *stored.shape[1:])
            return pread.read_float32(self._file.fileno(), stored.start + first * row_bytes, shape)
        except (EOFError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {stored.name} cannot be read: {error}") from error

    def _release(self, stored: StoredTensor, n_read: int) -> None:
        """Let go of resident pages after a large read; they stay in the system's cache."""
        if n_read >= 1 << 20 and hasattr(mmap, "MADV_DONTNEED"):
            page = mmap.PAGESIZE
            first = -(-stored.start // page) * page
            self._map.madvise(mmap.MADV_DONTNEED, first, (stored.start + stored.n_bytes) // page * page - first)

    def close(self) -> None:
        self._file.close()
        try:
            self._map.close()
        except BufferError:  # a view is still in use; the map goes when it does
            return
