"""Large values are refused before memory is taken for them, not by the system when it has run out.

Memory that was promised is found missing only when it is written to, and then some process is ended without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffharness.errors import UnsupportedError
from diffharness.machine import available_memory
from diffharness.weights.source import Float32Array

LINE = 64  # bytes that a processor moves at a time between its cache and memory
_LARGE = 1 << 28  # bytes; what is smaller is taken without asking the system


def require(n_bytes: int, what: str, *, tensor: str | None = None) -> None:
    """Raises UnsupportedError if `what` (the message's subject) would take more memory than there is."""
    if n_bytes < _LARGE:
        return
    there = available_memory()
    if there is not None and n_bytes > there:
        raise UnsupportedError(
            f"{what} would take {gigabytes(n_bytes)} of memory, and {gigabytes(there)} are available",
            hint="end other programs, or use a machine with more memory",
            tensor=tensor,
        )


def floats(shape: Sequence[int], what: str, *, tensor: str | None = None) -> Float32Array:
    """An array [*shape] to be filled, which begins with a cache line, so that no vector stored into it lies in two.

    Raises UnsupportedError as `require` does.
    """
    n_bytes = 4 * math.prod(shape)
    require(n_bytes, what, tensor=tensor)
    taken = np.empty(n_bytes + LINE, dtype=np.uint8)
    first = -taken.ctypes.data % LINE
    return taken[first : first + n_bytes].view(np.float32).reshape(shape)


def gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
