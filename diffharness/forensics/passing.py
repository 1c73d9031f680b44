"""Going once through the rows of a tensor on both sides, with the control's beside them: the sums that are left.

A ready control (a file) is read like the other two. Of a `Control`, which is made on demand, all rows
of a small tensor are made; of a large one rows that are spread over it, which give the usual loss, and
then those that are asked for because they look far against that. Rows that were not made count as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from diffharness.errors import EngineError
from diffharness.forensics.control import Control
from diffharness.forensics.levels import Levels, levels_of
from diffharness.forensics.rounding import STEP, far_values, largest, ways
from diffharness.forensics.rows import Rows
from diffharness.forensics.sample import again_at_most, spread_rows
from diffharness.forensics.sums import BoolArray, Powers, Sums, blocks_per_row, pieces
from diffharness.weights.source import Float32Array, IntArray, TensorInfo, WeightSource

# name, the artifact's tensor, and rows [n, width] of artifact, checkpoint and control
Observer = Callable[[str, TensorInfo, Float32Array, Float32Array, Float32Array | None], None]
Far = Callable[[Float32Array, Float32Array], BoolArray]
# The control of a run of the checkpoint's rows, or None: (first row, rows)
ControlOf = Callable[[int, Float32Array], Float32Array | None]


@dataclass
class Passed:
    """What is left of a tensor."""

    powers: Powers
    sums: Sums  # the artifact's
    far: BoolArray  # [rows], where a value by itself is far
    control: Sums | None = None
    exact: bool = True  # the artifact is the control, as far as there is one
    note: str | None = None
    no_control: str | None = None
    sample: Sample | None = None
    levels: Levels | None = None


@dataclass
class Sample:
    """Which rows of the control were made, and how to make more. `rows`, `a`, `b`, `c` are the first ones."""

    rows: IntArray
    a: Float32Array
    b: Float32Array
    c: Float32Array
    known: BoolArray  # [rows of the tensor]
    again: Callable[[IntArray], tuple[Float32Array, Float32Array | None]]  # the checkpoint's rows and the control's

    def make(self, rows: IntArray, control: Sums) -> bool:
        """Make these rows too, as many as are made at a time, the first ones first; False if there are none."""
        wanted = rows[~self.known[rows]][: len(self.rows)]
        if not len(wanted):
            return False
        b, c = self.again(np.sort(wanted))
        if c is None:
            return False
        control.put(np.sort(wanted), c, b)
        self.known[wanted] = True
        return True


@dataclass
class Passing:
    """The files, and who else is to see their rows."""

    artifact: WeightSource
    checkpoint: WeightSource
    control: WeightSource | None
    on_tensor: Observer | None = None
    on_sample: Observer | None = None
    refused: dict[str, str] = field(default_factory=dict)  # why there is no control, by type

    def through(self, name: str, other: str, called: str) -> Passed:
        """The tensor `name` against the checkpoint's `other`, of one shape; the observers know it as `called`."""
        a, b = Rows(self.artifact, name), Rows(self.checkpoint, other)
        if a.info.type in STEP:
            return self._rounded(called, a, b)
        if isinstance(self.control, Control):
            return self._made(called, a, b, self.control)
        return self._ready(called, a, b, self.control if called == name else None)

    def _ready(self, called: str, a: Rows, b: Rows, control: WeightSource | None) -> Passed:
        """Against a control that is there; against nothing where it has no such tensor."""
        info = None if control is None else control.tensors.get(called)
        if control is None or info is None or (info.type, info.shape) != (a.info.type, a.info.shape):
            return self._walk(called, a, b, lambda first, values: None)
        runs = Rows(control, called).runs()
        kept = _Kept(spread_rows(a.n, again_at_most(a.info.type, a.width)))
        passed = self._walk(called, a, b, lambda first, values: next(runs)[1], keep=kept)
        passed.levels = self._levels(a, kept)
        return passed

    def _made(self, called: str, a: Rows, b: Rows, control: Control) -> Passed:
        """Against one that is made here, of all rows or of some."""
        kind = a.info.type
        at_most = again_at_most(kind, a.width)

        def again(first: int, values: Float32Array) -> Float32Array | None:
            if kind in self.refused:
                return None
            try:
                return control.again(values, kind)
            except EngineError as error:
                self.refused[kind] = error.message
                return None

        kept = _Kept(spread_rows(a.n, at_most))
        if a.n <= at_most:
            passed = self._walk(called, a, b, again, keep=kept)
        else:
            passed = self._walk(called, a, b, lambda first, values: None, keep=kept)
            self._add_sample(passed, called, a, b, again, kept)
        if kind in self.refused:
            passed.control, passed.sample, passed.no_control = None, None, self.refused[kind]
        passed.levels = self._levels(a, kept)
        return passed

    def _add_sample(self, passed: Passed, called: str, a: Rows, b: Rows, again: ControlOf, kept: _Kept) -> None:
        rows, (x, y) = kept.rows, kept.values()
        c = again(0, y)
        if c is None:
            return
        known = np.zeros(a.n, dtype=np.bool_)
        known[rows] = True
        passed.control = Sums.usual(passed.powers, rows, c, y)
        passed.exact = bool(np.array_equal(x, c))

        def more(wanted: IntArray) -> tuple[Float32Array, Float32Array | None]:
            values = b.take(wanted)
            return values, again(0, values)

        passed.sample = Sample(rows, x, y, c, known, more)
        if self.on_sample is not None:
            self.on_sample(called, a.info, x, y, c)

    def _levels(self, a: Rows, kept: _Kept) -> Levels | None:
        """How the kept rows fit the levels of their blocks, where the artifact's bytes are to be had."""
        raw = getattr(self.artifact, "raw", None)
        if raw is None or not len(kept.rows):
            return None
        stored = raw(a.info.name).reshape(a.n, -1)[kept.rows]
        return levels_of(kept.rows, stored, a.info.type, *kept.values())

    def _rounded(self, called: str, a: Rows, b: Rows) -> Passed:
        """Against the checkpoint's rounding in the artifact's type, or the first on the way to which all is near."""
        kind = a.info.type
        # Of a large tensor the peak is that of some rows: a bound on what has no digits need not be exact.
        spread = spread_rows(b.n, again_at_most(kind, b.width))
        far = far_values(largest(b.take(spread)) if b.n else 0.0, kind)
        first = None
        for note, way in ways(kind, len(a.info.shape)):
            if first is None:
                first = self._walk(called, a, b, lambda _, values, way=way: way(values), far)  # type: ignore[misc]
                if not first.far.any():
                    return first
            elif _all_near(a, b, way, far):
                passed = self._walk(called, a, b, lambda _, values, way=way: way(values), far, watched=False)  # type: ignore[misc]
                passed.note = note
                return passed
        assert first is not None, "the type's own rounding comes first"
        return first

    def _walk(
        self,
        called: str,
        a: Rows,
        b: Rows,
        control_of: ControlOf,
        far: Far | None = None,
        *,
        keep: _Kept | None = None,
        watched: bool = True,
    ) -> Passed:
        n_blocks = blocks_per_row(a.width)
        passed = Passed(Powers.of(a.n, n_blocks), Sums.of(a.n, n_blocks), np.zeros(a.n, dtype=np.bool_))
        for first, x, y in _both(a, b):
            c = control_of(first, y)
            passed.powers.add(first, y)
            passed.sums.add(first, x, y)
            if c is not None:
                passed.control = passed.control or Sums.of(a.n, n_blocks)
                passed.control.add(first, c, y)
                exact = bool(np.array_equal(x, c))
                passed.exact &= exact
                if far is not None and not exact:
                    for rows in pieces(*x.shape):
                        passed.far[first + rows.start : first + rows.stop] = far(x[rows], c[rows]).any(axis=1)
            if keep is not None:
                keep.add(first, x, y)
            if watched and self.on_tensor is not None:
                self.on_tensor(called, a.info, x, y, c)
        passed.exact &= passed.control is not None
        return passed


class _Kept:
    """Some rows of both sides, kept as they pass."""

    def __init__(self, rows: IntArray) -> None:
        self.rows = rows  # in order
        self._parts: list[tuple[Float32Array, Float32Array]] = []

    def add(self, first: int, a: Float32Array, b: Float32Array) -> None:
        low, high = np.searchsorted(self.rows, (first, first + len(a)))
        # All of a run is kept as it is.
        here = slice(None) if high - low == len(a) else self.rows[low:high] - first
        self._parts.append((a[here], b[here]))

    def values(self) -> tuple[Float32Array, Float32Array]:
        if len(self._parts) > 1:
            a, b = (np.concatenate(side) for side in zip(*self._parts, strict=True))
            self._parts = [(a, b)]
        return self._parts[0]


def _both(a: Rows, b: Rows) -> Iterator[tuple[int, Float32Array, Float32Array]]:
    for (first, x), (_, y) in zip(a.runs(), b.runs(), strict=True):
        yield first, x, y


def _all_near(a: Rows, b: Rows, way: Callable[[Float32Array], Float32Array], far: Far) -> bool:
    return not any(far(x, way(y)).any() for _, x, y in _both(a, b))
