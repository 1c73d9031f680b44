"""Quantized blocks unpacked at the speed of memory: one readable layout per type, compiled for the processor at hand.

`machine` compiles and needs LLVM; the layouts by themselves do not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diffharness.weights.unpack import grids, simple, super_blocks
from diffharness.weights.unpack.simple import LUMP, LUMPED

# (bytes of stored blocks [n, type_size], float32 [n, block_size] to fill); both contiguous.
Unpack = Callable[[NDArray[np.uint8], NDArray[np.float32]], None]

LAYOUTS = simple.LAYOUTS | super_blocks.LAYOUTS | grids.LAYOUTS

__all__ = ["LAYOUTS", "LUMP", "LUMPED", "Unpack"]
