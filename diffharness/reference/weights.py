"""A `WeightSource` as torch tensors, read at the moment of use, one tensor ahead of the forward.

A layer asks for the same tensors in the same order as the layer before it. So while the forward computes with one
tensor, a thread reads (and dequantizes) the next; no more than these two are in memory on that account.

A small tensor takes that one place as a large one does. At the widths of Gemma 4 12B the forward still waits for no
more than 1 % of its time with 512 tokens (7 % with 64), which is all that reading ahead by bytes could win. Experts are
read when tokens were routed to them, not ahead: with 26B-A4B's that is a fifth of the processor's time with 512 tokens
and a third with 64, half of it to fetch stored bytes from the system's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from diffharness import taps
from diffharness.weights.source import Float32Array, WeightSource


class SourceWeights:
    """A WeightSource in one dtype on one device.

    With `keep`, whole tensors and single experts that were read stay until `end_layer`: for a layer that several
    groups of chunks go through one after another.
    """

    def __init__(
        self, source: WeightSource, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, torch.device(device)
        self.keep = False
        self.asked: set[str] = set()  # names of all tensors that were read, whole or in part
        self._kept: dict[tuple[str, int | None], Tensor] = {}
        self._order: list[str] = []  # tensors of this layer, as they were asked for
        self._expected: dict[str, str] = {}  # a tensor of this layer, and the one that will be asked for next
        self._ahead: tuple[str, Future[Float32Array]] | None = None
        self._reader: ThreadPoolExecutor | None = None

    def get(self, name: str) -> Tensor:
        self.asked.add(name)
        return self._once((name, None), lambda: self._read(name))

    def find(self, name: str) -> Tensor | None:
        return self.get(name) if self.has(name) else None

    def rows(self, name: str, rows: slice | Tensor) -> Tensor:
        self.asked.add(name)
        if isinstance(rows, Tensor):
            return self._tensor(self.source.take(name, rows.cpu().numpy().astype(np.int64)))
        if rows.stop is not None and rows.stop - (rows.start or 0) == 1:
            # an expert, which the next group of chunks will likely want too
            return self._once((name, rows.start or 0), lambda: self.source.take(name, rows))
        return self._tensor(self.source.take(name, rows))

    def has(self, name: str) -> bool:
        return name in self.source.tensors

    def n_rows(self, name: str) -> int:
        return self.source.tensors[name].shape[0]

    def end_layer(self, il: int) -> None:
        """Layer `il` is done: let go of what was kept, and expect of the next layer what this one asked for."""
        self._kept.clear()
        following = [_of_layer(name, il + 1) for name in self._order]
        present = [name for name in following if name in self.source.tensors]
        self._expected = dict(pairwise(present))
        self._order = []
        if present:
            self._start(present[0])

    def close(self) -> None:
        """Let go of everything and end the reading thread; reading may start again afterwards."""
        self._kept.clear()
        self._order, self._expected, self._ahead = [], {}, None
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader = None

    def _once(self, key: tuple[str, int | None], read: Callable[[], Float32Array]) -> Tensor:
        if (kept := self._kept.get(key)) is not None:
            return kept
        tensor = self._tensor(read())
        if self.keep:
            self._kept[key] = tensor
        return tensor

    def _read(self, name: str) -> Float32Array:
        self._order.append(name)
        if self._ahead is not None and self._ahead[0] == name:
            values = self._ahead[1].result()
            self._ahead = None
        else:
            values = self.source.read(name)
        if name in self._expected:
            self._start(self._expected[name])
        return values

    def _start(self, name: str) -> None:
        """Begin to read `name`, unless a read that nobody came for is still on."""
        if self._ahead is not None and not self._ahead[1].done():
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead = (name, self._reader.submit(self.source.read, name))

    def _tensor(self, values: Float32Array) -> Tensor:
        if not values.flags.writeable:
            values = values.copy()  # a view of a mapped file; torch knows no read-only tensors
        return torch.from_numpy(np.ascontiguousarray(values)).to(device=self.device, dtype=self.dtype)


def _of_layer(name: str, il: int) -> str:
    """The name of the same tensor in layer `il`; unchanged outside of the layers."""
    layer, rest = taps.split(name)
    return name if layer is None else taps.layer_tap(il, rest)
