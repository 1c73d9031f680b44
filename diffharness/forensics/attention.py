"""Attention health, measured: how attention is spread over the keys, per layer, head and range of positions.

The weights themselves are never kept: `AttentionMeter` sees them block by block as the reference makes them and adds
up what it needs. Queries that see one key only are left out, for there is nothing to be spread. What two sides'
numbers mean against each other is `attention_changes`' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float64Array = NDArray[np.float64]

_ENTROPY, _RATIO, _QUERIES, _FIRST, _SEE_FIRST = range(5)  # sums that are kept for each head and range


@dataclass(frozen=True)
class AttentionStats:
    """Means over the queries of each range of positions, each [layer, head, range].

    NaN where a layer has fewer heads than another, or where no query of a range has what is averaged.

    `entropy`: the entropy of a query's weights over that of the uniform distribution on the keys it sees,
    H / ln(n_visible), 0 (one key has it all) to 1 (uniform). `first_share`: the weight on position 0, over queries
    that see it. `effective_keys`: exp of the mean of H in nats, the number of keys that uniform weights of the
    same entropy would be spread over.
    """

    ranges: tuple[tuple[int, int], ...]  # [start, stop) of positions in a chunk
    entropy: Float64Array
    first_share: Float64Array
    effective_keys: Float64Array

    @property
    def n_layer(self) -> int:
        return int(self.entropy.shape[0])


class AttentionMeter:
    """Adds up one stream's attention weights; `ranges` [start, stop) are ascending and do not overlap."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranges = tuple(ranges)
        self._sums: dict[int, Float64Array] = {}  # by layer: [sums, head, range]

    def see(self, layer: int, weights: Tensor, hidden: Tensor, first_query: int, first_key: int) -> None:
        """A block of `weights` [chunks, KV heads, group, queries, keys]; `hidden` [queries, keys] marks unseen keys."""
        n_queries = weights.shape[-2]
        heads = weights.flatten(1, 2)  # [chunks, head, queries, keys]: query head h reads KV head h // group
        tiny = torch.finfo(weights.dtype).tiny  # p ln p is 0 where p is, and where it is below any that counts
        entropy = -(heads.clamp_min(tiny).log_().mul_(heads)).sum(dim=-1).sum(dim=0)
        n_visible = (~hidden).sum(dim=-1).cpu().numpy()
        values = np.zeros((_SEE_FIRST + 1, heads.shape[1], n_queries))
        values[_ENTROPY] = entropy.cpu().numpy()
        values[_RATIO] = values[_ENTROPY] / np.log(np.maximum(n_visible, 2))
        values[_QUERIES] = len(weights)
        if first_key == 0:
            sees_first = ~hidden[:, 0].cpu().numpy()
            values[_FIRST] = np.where(sees_first, heads[..., 0].sum(dim=0).cpu().numpy(), 0.0)
            values[_SEE_FIRST] = len(weights) * sees_first
        values[..., n_visible < 2] = 0.0
        positions = np.arange(first_query, first_query + n_queries)
        member = np.array([(positions >= start) & (positions < stop) for start, stop in self._ranges], dtype=np.float64)
        summed = values @ member.T
        self._sums[layer] = self._sums[layer] + summed if layer in self._sums else summed

    def stats(self) -> AttentionStats:
        """What has been seen so far."""
        n_layer = max(self._sums, default=-1) + 1
        n_head = max((sums.shape[1] for sums in self._sums.values()), default=0)
        sums = np.zeros((_SEE_FIRST + 1, n_layer, n_head, len(self._ranges)))
        for layer, seen in self._sums.items():
            sums[:, layer, : seen.shape[1]] = seen
        with np.errstate(invalid="ignore"):  # 0 / 0: NaN says that nothing was averaged
            return AttentionStats(
                ranges=self._ranges,
                entropy=sums[_RATIO] / sums[_QUERIES],
                first_share=sums[_FIRST] / sums[_SEE_FIRST],
                effective_keys=np.exp(sums[_ENTROPY] / sums[_QUERIES]),
            )
