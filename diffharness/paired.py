"""Is one side better than the other at the same positions? Paired differences; their error allows for neighbours.

The NLL of a token depends on the text before it, so that differences at neighbouring positions are alike and fewer of
them are independent than were scored. The error is therefore taken from blocks: whole chunks where there are at least
`MANY_CHUNKS`, else runs of `BLOCK` positions inside of each chunk, which is far beyond the few tokens over which
differences stay alike. Of it and the error for independent positions the larger one counts.

Several pairs are each judged by itself: of 20 pairs without a difference, one is told apart by chance.
"""

from __future__ import annotations

import math

import numpy as np

from diffharness.metrics import Float64Array, IntArray
from diffharness.records.grade import Paired

MANY_CHUNKS = 16
BLOCK = 32
FEWEST_BLOCKS = 5
_NORMAL = 1.959964  # the normal distribution's quantile at 97.5 %


def paired(a: Float64Array, b: Float64Array, chunk_of: IntArray) -> Paired:
    """Mean of a - b over positions [n] in text order, each with the number of its chunk, and whether it is told from 0.

    Where a side is not finite there is nothing to tell: the mean is nan, unless only one of the two is infinite.
    """
    if not a.shape == b.shape == chunk_of.shape or a.size == 0:
        raise ValueError(f"expected positions alike on both sides, got {a.shape}, {b.shape}, {chunk_of.shape}")
    with np.errstate(invalid="ignore"):
        difference = a - b
    mean = float(difference.mean())
    blocks = block_numbers(chunk_of)
    n_blocks = int(blocks[-1]) + 1
    if not math.isfinite(mean) or n_blocks < FEWEST_BLOCKS:
        return Paired(mean=mean, blocks=n_blocks, told_apart=math.isinf(mean))
    centred = np.bincount(blocks, weights=difference - mean)
    of_blocks = math.sqrt(float((centred**2).sum()) * n_blocks / (n_blocks - 1)) / len(a)
    independent = math.sqrt(float(difference.var()) / (len(a) - 1))
    error = max(of_blocks, independent)
    limit = critical(n_blocks - 1)
    if error == 0.0:
        return Paired(mean=mean, error=0.0, blocks=n_blocks, critical=limit, told_apart=mean != 0.0)
    z = mean / error
    return Paired(mean=mean, error=error, z=z, critical=limit, blocks=n_blocks, told_apart=abs(z) > limit)


def block_numbers(chunk_of: IntArray) -> IntArray:
    """The number of each position's block, counted from 0; a short rest joins the chunk's last full block."""
    starts = np.flatnonzero(np.diff(chunk_of, prepend=chunk_of[0] - 1))
    lengths = np.diff(starts, append=len(chunk_of))
    if len(starts) >= MANY_CHUNKS:
        return np.repeat(np.arange(len(starts)), lengths)
    numbers, first = np.empty(len(chunk_of), dtype=np.int64), 0
    for start, length in zip(starts, lengths, strict=True):
        n = max(1, int(length) // BLOCK)
        numbers[start : start + length] = first + np.minimum(np.arange(length) // BLOCK, n - 1)
        first += n
    return numbers


def critical(freedom: int) -> float:
    """Student's t at 97.5 %, by the expansion in 1/freedom (Abramowitz and Stegun 26.7.5); within 0.3 % from 4 on."""
    z = _NORMAL
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**i for i, term in enumerate(terms))
