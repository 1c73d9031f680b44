"""Captures: what one runner produced for one fixture, as a safetensors file on disk.

A capture holds one float32 array [n_tokens, width] per tap; a row is a token of the flattened
fixture, chunk after chunk. Values arrive layer by layer and in pieces of the text, so the writer
keeps room for the header at the front of the file, gives a tap its region when its first rows come,
and writes the header last. Until then the file is called `<name>.part`. Standard library and numpy
only: the engine's worker writes captures under interpreters that have nothing else.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from diffharness.errors import BadInputError, DiffharnessError, OutputError
from diffharness.taps import graph_order

Float32Array = NDArray[np.float32]

SCHEMA = "diffharness.capture/1"
_HEADER_ROOM = 1 << 20  # bytes kept for the header; some 9,000 taps
_HEADER_LIMIT = 100_000_000  # what the safetensors library accepts
_SPARE_BYTES = 32 << 20  # never fill a disk to its last byte
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class _Region:
    start: int  # bytes from the end of the header
    width: int
    written: NDArray[np.bool_]  # by row


class CaptureWriter:
    """Writes a capture of `n_tokens` rows; usable as a context manager, which finishes or discards.

    Rows of a tap may come in any order and may be written again: the last value stays.
    """

    def __init__(self, path: str | os.PathLike[str], n_tokens: int, meta: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self.n_tokens = n_tokens
        self.meta = {"schema": SCHEMA, **(meta or {})}
        self._part = self.path.with_name(self.path.name + ".part")
        self._regions: dict[str, _Region] = {}
        self._end = 0
        try:
            self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as err:
            raise OutputError(
                f"cannot write {self._part}: {err.strerror}", hint="name a folder that can be written to"
            ) from err

    @property
    def taps(self) -> list[str]:
        """Taps seen so far, in graph order."""
        return sorted(self._regions, key=graph_order)

    def write(self, tap: str, start_row: int, values: NDArray[Any]) -> None:
        """Store `values` [n, width] as rows start_row .. start_row + n of `tap`.

        Raises ValueError if the rows do not fit, OutputError if the disk is full.
        """
        n, width = values.shape
        region = self._regions.get(tap) or self._allocate(tap, width)
        if width != region.width:
            raise ValueError(f"{tap} is {region.width} wide, but rows of width {width} came")
        if start_row < 0 or start_row + n > self.n_tokens:
            raise ValueError(f"{tap}: rows {start_row}..{start_row + n} lie outside of 0..{self.n_tokens}")
        data = np.ascontiguousarray(values, dtype="<f4").data.cast("B") if values.size else memoryview(b"")
        self._put(data, 8 + _HEADER_ROOM + region.start + start_row * width * 4)
        region.written[start_row : start_row + n] = True

    def incomplete(self) -> dict[str, int]:
        """Taps that lack rows, with how many they lack."""
        missing = {tap: int((~region.written).sum()) for tap, region in self._regions.items()}
        return {tap: missing[tap] for tap in self.taps if missing[tap]}

    def fill(self, value: float) -> None:
        """Rows that were never written hold `value` from now on."""
        for tap, region in self._regions.items():
            for row in np.flatnonzero(~region.written):
                self.write(tap, int(row), np.full((1, region.width), value, dtype=np.float32))

    def finish(self) -> Path:
        """Write the header and give the file its name; every tap must have all its rows."""
        if lacking := self.incomplete():
            tap, rows = next(iter(lacking.items()))
            raise DiffharnessError(f"{len(lacking)} taps lack rows, first {tap}: {rows} of {self.n_tokens}")
        entries: dict[str, Any] = {"__metadata__": self.meta}
        for tap, region in sorted(self._regions.items(), key=lambda item: item[1].start):
            end = region.start + self.n_tokens * region.width * 4
            shape = [self.n_tokens, region.width]
            entries[tap] = {"dtype": "F32", "shape": shape, "data_offsets": [region.start, end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        if len(header) > _HEADER_ROOM:
            raise DiffharnessError(f"the header of {len(self._regions)} taps takes {len(header)} bytes")
        self._put(memoryview(_HEADER_ROOM.to_bytes(8, "little") + header.ljust(_HEADER_ROOM)), 0)
        os.close(self._fd)
        self._fd = -1
        os.replace(self._part, self.path)
        return self.path

    def discard(self) -> None:
        """Remove the unfinished file; harmless after `finish`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._part.unlink(missing_ok=True)

    def _allocate(self, tap: str, width: int) -> _Region:
        size = self.n_tokens * width * 4
        free = shutil.disk_usage(self._part.parent).free
        if free < size + _SPARE_BYTES:
            raise OutputError(
                f"{self._part.parent}: no space for tap {tap}: "
                f"{(size + _SPARE_BYTES) / (1 << 20):.1f} MiB must be free, found {free / (1 << 20):.1f} MiB",
                hint="free some space, run fewer --tokens, or choose another place with --out or TMPDIR",
            )
        region = _Region(self._end, width, np.zeros(self.n_tokens, dtype=np.bool_))
        self._end += size
        try:
            os.ftruncate(self._fd, 8 + _HEADER_ROOM + self._end)
        except OSError as err:
            raise self._failed(err) from err
        self._regions[tap] = region
        return region

    def _put(self, data: memoryview, offset: int) -> None:
        try:
            while data:
                done = os.pwrite(self._fd, data, offset)
                data, offset = data[done:], offset + done
        except OSError as err:
            raise self._failed(err) from err

    def _failed(self, err: OSError) -> OutputError:
        full = err.errno in _NO_SPACE
        hint = "capture fewer tokens, or name a folder on another disk" if full else None
        return OutputError(f"cannot write {self._part}: {err.strerror}", hint=hint)

    def __enter__(self) -> CaptureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None and self._fd >= 0:
                self.finish()
        finally:
            self.discard()


class Capture:
    """A finished capture, memory-mapped; arrays stay valid as long as they are referenced."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises BadInputError if the file is not a capture; nothing is read but the header."""
        self.path = Path(path)
        self.meta: dict[str, str] = {}
        self.n_tokens = 0
        self._arrays: dict[str, Float32Array] = {}
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise self._bad(f"{size} bytes are too few for a header")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as err:
            raise BadInputError(f"cannot read capture {self.path}: {err.strerror}") from err
        self._parse(size)

    @property
    def taps(self) -> list[str]:
        """Names of the taps, in graph order."""
        return sorted(self._arrays, key=graph_order)

    def __contains__(self, tap: object) -> bool:
        return tap in self._arrays

    def read(self, tap: str) -> Float32Array:
        """The tap's value, float32 [n_tokens, width], read-only and not yet in memory; KeyError if absent."""
        return self._arrays[tap]

    def _bad(self, why: str) -> BadInputError:
        return BadInputError(f"{self.path} is not a capture: {why}")

    def _parse(self, size: int) -> None:
        length = int.from_bytes(self._map[:8], "little")
        if length > min(_HEADER_LIMIT, size - 8):
            raise self._bad(f"its header claims {length} bytes of {size}")
        try:
            header = json.loads(self._map[8 : 8 + length])
        except (ValueError, RecursionError) as err:
            raise self._bad(f"its header is not JSON ({err})") from err
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        meta = header.pop("__metadata__", {})
        if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
            raise self._bad("its metadata is not a map of strings")
        self.meta = meta
        for tap, entry in header.items():
            self._arrays[tap] = self._array(tap, entry, 8 + length, size)
        rows = {array.shape[0] for array in self._arrays.values()}
        if len(rows) > 1:
            raise self._bad(f"its taps have different numbers of tokens: {sorted(rows)}")
        self.n_tokens = rows.pop() if rows else 0

    def _array(self, tap: str, entry: object, base: int, size: int) -> Float32Array:
        if not isinstance(entry, dict) or entry.get("dtype") != "F32":
            raise self._bad(f"{tap} is not float32")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not _counts(shape) or not _counts(offsets) or len(shape) != 2 or len(offsets) != 2:
            raise self._bad(f"{tap} has shape {shape} and offsets {offsets}")
        (rows, width), (start, end) = shape, offsets
        if end - start != rows * width * 4 or start > end or base + end > size:
            raise self._bad(f"{tap} of shape {shape} does not lie in bytes {start}..{end} of {size - base}")
        array: Float32Array = np.frombuffer(self._map, dtype="<f4", count=rows * width, offset=base + start)
        return array.reshape(rows, width)


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
