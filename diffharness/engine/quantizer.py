"""ggml's own quantizer for rows at hand: one worker process, as many requests as are made.

Rows and blocks pass through memory shared with the worker, in pieces, so that neither a file of
values nor a process per tensor is needed. The worker starts with the first request; one that died is
replaced by the next request.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.engine.crash import EngineCrash
from diffharness.engine.process import Dialogue
from diffharness.engine.runner import NEED_IMPORTANCE
from diffharness.errors import OutputError
from diffharness.settings import EngineSettings
from diffharness.weights.dequant import BLOCKS, byte_size
from diffharness.weights.gguf_write import encode_floats
from diffharness.weights.source import Float32Array

Bytes = NDArray[np.uint8]

_FLOATS = ("F32", "F16", "BF16")
_PIECE = 1 << 23  # values sent at a time: 32 MiB, and as much at most for their blocks


class Quantizer:
    """Rows to blocks. Close it or use it as a context manager; it may be used from several threads, in turn."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self._dialogue: Dialogue | None = None
        self._memory = _Shared()
        self._lock = threading.Lock()

    def quantize(self, rows: Float32Array, type_name: str, importance: Float32Array | None = None) -> Bytes:
        """float32 rows [n, width] as [n, bytes of a row] of `type_name`, by ggml_quantize_chunk.

        `importance` [width] weighs the columns, as an importance matrix does; types that cannot be made
        without one get equal weights. F32, F16 and BF16 are made in this process. Raises EngineCrash
        (kind `refused` for a name that is no type, for a width that is not whole blocks or
        importance of another size), OutputError where there is no room for the shared memory.
        """
        type_name = type_name.upper()
        n, width = rows.shape
        _check(width, type_name, importance)
        n_bytes = byte_size(type_name, (1, width))
        if type_name in _FLOATS:
            return encode_floats(rows, type_name).reshape(n, n_bytes)
        if importance is None and type_name in NEED_IMPORTANCE:
            importance = np.ones(width, dtype=np.float32)
        blocks = np.empty((n, n_bytes), dtype=np.uint8)
        step = max(1, _PIECE // width)
        with self._lock:
            for first in range(0, n, step):
                piece = slice(first, min(first + step, n))
                self._piece(rows[piece], type_name, importance, blocks[piece])
        return blocks

    def _piece(self, rows: Float32Array, type_name: str, importance: Float32Array | None, blocks: Bytes) -> None:
        n, width = rows.shape
        at_importance = 4 * n * width
        at_blocks = at_importance + (4 * width if importance is not None else 0)
        memory = self._memory.of(at_blocks + blocks.size)
        np.copyto(memory[:at_importance].view(np.float32).reshape(n, width), rows)
        if importance is not None:
            memory[at_importance:at_blocks].view(np.float32)[...] = importance
        request = {
            "type": type_name,
            "n_rows": n,
            "width": width,
            "importance": None if importance is None else at_importance,
            "out": at_blocks,
            "size": memory.size,
        }
        self._running().ask(request)
        blocks[...] = memory[at_blocks : at_blocks + blocks.size].reshape(blocks.shape)

    def _running(self) -> Dialogue:
        if self._dialogue is None or self._dialogue.closed:
            descriptor = self._memory.descriptor
            job: Mapping[str, Any] = {
                "kind": "serve_quantizer",
                "threads": self.settings.threads,
                "memory": descriptor,
            }
            self._dialogue = Dialogue(self.settings, job, [descriptor])
        return self._dialogue

    def close(self) -> None:
        """End the worker, and give the shared memory back. A later request starts anew."""
        if self._dialogue is not None:
            self._dialogue.close()
        self._memory.close()

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(width: int, type_name: str, importance: Float32Array | None) -> None:
    if type_name not in BLOCKS:
        raise EngineCrash(f"{type_name} is no tensor type; known are {', '.join(BLOCKS)}", kind="refused")
    block, _ = BLOCKS[type_name]
    if width == 0 or width % block:
        raise EngineCrash(
            f"rows of {width} values cannot be quantized to {type_name}, whose blocks have {block}",
            kind="refused",
            hint="choose a type with smaller blocks",
        )
    if importance is not None and importance.shape != (width,):
        found = f"importance of shape {importance.shape} for rows of {width} values"
        raise EngineCrash(f"{found}, expected ({width},)", kind="refused")


class _Shared:
    """Memory that a child process can map: a nameless file, in memory where the system has such files."""

    def __init__(self) -> None:
        self.descriptor = -1
        self._view: Bytes = np.empty(0, dtype=np.uint8)

    def of(self, n_bytes: int) -> Bytes:
        """At least that many bytes; OutputError where there is no room for them."""
        if self._view.size < n_bytes:
            try:
                if self.descriptor < 0:
                    self.descriptor = nameless_file("quantizer")
                os.ftruncate(self.descriptor, n_bytes)
                self._view = np.frombuffer(mmap.mmap(self.descriptor, n_bytes), dtype=np.uint8)
            except (OSError, ValueError) as error:
                raise OutputError(f"no room for {n_bytes >> 20} MiB shared with the quantizer: {error}") from error
        return self._view

    def close(self) -> None:
        self._view = np.empty(0, dtype=np.uint8)
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def nameless_file(what: str) -> int:
    """The descriptor of a file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"diffharness-{what}", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
