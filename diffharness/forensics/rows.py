"""One tensor's rows, all leading axes as one: whole where it is small, else in runs, each read once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffharness.weights.source import Float32Array, IntArray, WeightSource

_WHOLE = 1 << 24  # values that are read in one go at most: 64 MiB
_RUN = 1 << 22  # values of a run, of larger tensors


class Rows:
    """Rows [n, width] of a tensor. A small one is kept once it was read, and costs nothing to go through again."""

    def __init__(self, source: WeightSource, name: str) -> None:
        self._source, self._name = source, name
        self.info = source.tensors[name]
        shape = self.info.shape
        self.width = shape[-1] if shape else 1
        self.n = self.info.n_elements // self.width if self.width else 0
        # rows of one entry of the first axis: an expert has several
        self._per_entry = self.n // shape[0] if len(shape) > 1 and shape[0] else self.n
        self._small = self.info.n_elements <= _WHOLE or len(shape) < 2
        self._whole: Float32Array | None = None

    def runs(self) -> Iterator[tuple[int, Float32Array]]:
        """The first row's number and the rows, run by run; the runs of tensors of one shape are alike."""
        if self._small:
            yield 0, self._read()
            return
        entries = max(1, _RUN // (self._per_entry * self.width))
        # What cannot be read by rows would be read whole for every run.
        whole = None if _by_rows(self._source, self._name) else self._source.read(self._name)
        n_entries = self.info.shape[0]
        for first in range(0, n_entries, entries):
            part = slice(first, min(first + entries, n_entries))
            values = self._source.take(self._name, part) if whole is None else whole[part]
            yield first * self._per_entry, values.reshape(-1, self.width)

    def take(self, rows: IntArray) -> Float32Array:
        """Some rows, in the order given."""
        if self._small:
            return self._read()[rows]
        if self._per_entry == 1:
            return self._source.take(self._name, rows).reshape(-1, self.width)
        entries, within = np.divmod(rows, self._per_entry)
        found = np.empty((len(rows), self.width), dtype=np.float32)
        for entry in np.unique(entries).tolist():
            here = entries == entry
            values = self._source.take(self._name, slice(entry, entry + 1))
            found[here] = values.reshape(-1, self.width)[within[here]]
        return found

    def _read(self) -> Float32Array:
        if self._whole is None:
            self._whole = self._source.read(self._name).reshape(self.n, self.width)
        return self._whole


def _by_rows(source: WeightSource, name: str) -> bool:
    """Whether `take` reads only the rows that are asked for; a source that does not say is taken to."""
    says = getattr(source, "by_rows", None)
    return True if says is None else bool(says(name))
