"""How a measure grows: the exponent of the power of its size that fits best."""

from __future__ import annotations

import math
from collections.abc import Sequence


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of value = factor · size^p: the slope of the logarithms, by least squares.

    0 where the measure does not depend on the size, 1 where it is proportional to it. A cost that is there at any
    size draws p toward 0: give sizes at which it is small. Raises ValueError for fewer than two different sizes,
    or where a size or value is not positive.
    """
    if len(sizes) != len(values):
        raise ValueError(f"{len(sizes)} sizes and {len(values)} values")
    if min((*sizes, *values), default=0) <= 0:
        raise ValueError("expected positive sizes and values")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    spread = sum((each - middle) ** 2 for each in x)
    if spread == 0:
        raise ValueError("expected at least two different sizes")
    return sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / spread
