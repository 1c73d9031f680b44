"""Float32 values straight from a file into an array: one copy, and no page of a mapping is touched.

Reading half a gigabyte of float32 weights through a mapping costs more in page faults than in copying,
as much as a tenth of a small model's forward.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np

from diffharness.weights import room
from diffharness.weights.source import Float32Array

AVAILABLE = hasattr(os, "preadv") and sys.byteorder == "little"


def read_float32(descriptor: int, offset: int, shape: Sequence[int]) -> Float32Array:
    """`shape` little-endian floats from byte `offset` on; EOFError if the file ends before them.

    Raises UnsupportedError if memory does not suffice.
    """
    values = room.floats(shape, f"a tensor of shape {tuple(shape)} as float32")
    rest = memoryview(values.reshape(-1).view(np.uint8).data)
    while len(rest):
        n = os.preadv(descriptor, [rest], offset)
        if n == 0:
            raise EOFError(f"the file ends at byte {offset}, {len(rest)} bytes before the end of a tensor")
        rest, offset = rest[n:], offset + n
    return values


def contiguous(rows: object, n_rows: int) -> tuple[int, int] | None:
    """First row and number of rows, if `rows` is a plain slice; None for anything else."""
    if not isinstance(rows, slice):
        return None
    start, stop, step = rows.indices(n_rows)
    return (start, max(0, stop - start)) if step == 1 else None
