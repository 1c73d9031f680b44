"""How far each tensor of an artifact is from the checkpoint's, against what its type loses anyway.

The measure is relative: NMSE of the artifact's values, the checkpoint's below the line. The control
is the checkpoint's own tensor quantized afresh to the same type by ggml's quantizer. A tensor is far
when its error is beyond the control's by more than importance weights explain, over the whole tensor,
in any one row or in any block of a row (a damaged block disappears in the mean of a large tensor and
in that of a long row); or when its values are not those that its blocks' levels offer (`levels`). F32,
F16 and BF16 lose only their rounding, so every single value is judged.

Floors: `artifact.tensor_factor`, `artifact.tensor_floor`, factor and floor of `artifact.row` and `artifact.block`,
`artifact.weighed_factor` and `artifact.weighed_most`, and those of `levels`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.forensics.levels import lean_limits, leans
from diffharness.forensics.passing import Observer, Passed, Passing
from diffharness.forensics.rounding import STEP
from diffharness.forensics.sums import BoolArray, Float64Array, cosine, ratio
from diffharness.records import TensorRow
from diffharness.settings import Floors
from diffharness.taps import split
from diffharness.weights.grid import has_levels
from diffharness.weights.source import EMBEDDING, HEAD, IntArray, TensorInfo, WeightSource

_QUIET = 1e-2  # of the median row's or block's power
_LONG_ROW = 4  # blocks from which on a row's mean says more than its worst block


@dataclass(frozen=True)
class TensorError:
    """One tensor's errors. `control` is None where there was nothing to judge the type's loss by."""

    name: str
    type: str
    shape: tuple[int, ...]
    error: float
    control: float | None
    cos: float
    non_finite: int  # values of the artifact that are NaN or infinite
    far_rows: int  # rows that are beyond the control's error, whole or in a block or in a value
    worst_row: int | None  # the row with the largest error, counted over all leading axes
    limit: float  # what `error` may be at most
    note: str | None = None  # why it could not be measured, or what explains it
    exact: bool = False  # bit for bit the control, as far as that was made
    far: BoolArray | None = field(default=None, compare=False, repr=False)  # [rows], counted by `far_rows`
    no_control: str | None = None  # why none could be made
    misplaced: float | None = None  # NMSE beyond that of the nearest levels of the tensor's own blocks
    misplaced_usual: float = 0.0  # what importance weights may leave of it
    why: tuple[str, ...] = ()  # what is beyond the control, other than the error: `levels`, `scale`, `offset`
    beyond_rows: int = 0  # of `far_rows`, those that are beyond by their error and not by their levels alone

    @property
    def layer(self) -> int | None:
        return split(self.name)[0]

    @property
    def klass(self) -> str:
        """The name without its layer: `attn_q.weight`."""
        return split(self.name)[1]

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1

    @property
    def excess(self) -> float:
        """The error that the type does not explain; 0 where there is nothing to judge by."""
        if self.misplaced is not None:
            return max(0.0, self.misplaced - self.misplaced_usual)
        return 0.0 if self.control is None and np.isfinite(self.error) else max(0.0, self.error - (self.control or 0.0))

    @property
    def judged(self) -> bool:
        return self.control is not None or not np.isfinite(self.error)

    @property
    def damaged(self) -> bool:
        return not self.error <= self.limit or self.far_rows > 0 or bool(self.why)

    @property
    def is_local(self) -> bool:
        """Damaged in a few rows, blocks or values only, while the whole is as near as its type allows."""
        return self.far_rows > 0 and self.error <= self.limit and not self.why

    def row(self) -> TensorRow:
        return TensorRow(
            name=self.name,
            type=self.type,
            layer=self.layer,
            klass=self.klass,
            error=self.error,
            control=self.control,
            limit=self.limit,
            cos=self.cos,
            non_finite=self.non_finite,
            damaged=self.damaged,
        )


@dataclass(frozen=True)
class Drift:
    """Every tensor that both sides have, and the names that only one has."""

    tensors: list[TensorError]
    missing: list[str]  # only in the checkpoint
    extra: list[str]  # only in the artifact


def tensor_errors(
    artifact: WeightSource,
    checkpoint: WeightSource,
    control: WeightSource | None,
    floors: Floors,
    *,
    on_tensor: Observer | None = None,
    on_sample: Observer | None = None,
) -> Drift:
    """Compare tensor by tensor, in the artifact's order.

    Without a control (or where it lacks a tensor of the same type) tensors kept as F32, F16 and BF16
    are still judged, by rounding the checkpoint's values; of the others only the error is given. A
    tied head may be stored on one side only; it is then compared with the embedding.

    Each file is read once, large tensors in runs of rows. A ready `control` is read whole; of a
    `Control` some rows of large tensors are made (`passing` says which). `on_tensor` gets every run of
    rows as it was read, those of one tensor one after the other; where the control's rows are not all
    made they are None there, and `on_sample` then gets rows that are spread over the tensor, control included.

    Raises CheckpointError where the checkpoint itself holds NaN or infinity.
    """
    passing = Passing(artifact, checkpoint, control, on_tensor, on_sample)
    errors: list[TensorError] = []
    extra: list[str] = []

    def compare(name: str, other: str, called: str) -> None:
        info, theirs = artifact.tensors[name], checkpoint.tensors[other]
        if info.shape == theirs.shape:
            found = passing.through(name, other, called)
            _require_finite(checkpoint.label, other, found)
            errors.append(_judged(called, info, found, floors))
        else:
            note = f"shape {info.shape} in the artifact, {theirs.shape} in the checkpoint"
            infinite = float("inf")
            errors.append(TensorError(called, info.type, info.shape, infinite, None, 0.0, 0, 0, None, 0.0, note))

    for name in artifact.tensors:
        other = _counterpart(name, checkpoint)
        if other is None:
            extra.append(name)
        else:
            compare(name, other, name)
    missing = [name for name in checkpoint.tensors if name not in artifact.tensors]
    if HEAD in missing and EMBEDDING in artifact.tensors:
        missing.remove(HEAD)
        compare(EMBEDDING, HEAD, HEAD)
    return Drift(errors, missing, extra)


def _counterpart(name: str, source: WeightSource) -> str | None:
    if name in source.tensors:
        return name
    return EMBEDDING if name == HEAD and EMBEDDING in source.tensors else None


def _require_finite(label: str, name: str, found: Passed) -> None:
    if not np.isfinite(found.powers.power).all():
        raise CheckpointError(
            f"{label}: {name} holds values that are NaN or infinite: nothing can be judged by this checkpoint",
            hint="download or save the checkpoint again; without one, `diffharness run MODEL` checks the artifact",
        )


def _judged(name: str, info: TensorInfo, found: Passed, floors: Floors) -> TensorError:
    error = ratio(float(found.sums.error.sum()), float(found.powers.power.sum()))
    far, usual, limit = found.far, None, float("inf")
    if found.control is not None:
        far = found.far | _far(found, floors)
        usual, limit = _limit(found, floors)
        if found.sample is not None:
            made = found.sample.make(np.flatnonzero(far), found.control)
            if error > limit:
                # What is beyond may lie in rows whose control was not made: those with the largest errors first.
                made |= found.sample.make(np.argsort(-found.sums.rows, kind="stable"), found.control)
            if made:
                far, (usual, limit) = found.far | _far(found, floors), _limit(found, floors)
    placed, beyond_rows = _Placed(limit), int(far.sum())
    if usual is not None and info.type not in STEP:
        placed = _placed(found, info, usual, limit, floors)
        far[placed.far] = True
    rows = found.sums.rows
    return TensorError(
        name=name,
        type=info.type,
        shape=info.shape,
        error=error,
        control=usual,
        cos=cosine(found.sums, found.powers),
        non_finite=found.sums.non_finite,
        far_rows=int(far.sum()),
        worst_row=int(np.nan_to_num(rows, nan=np.inf).argmax()) if len(rows) else None,
        limit=placed.limit,
        note=found.note,
        exact=found.exact,
        far=far,
        no_control=found.no_control,
        misplaced=placed.misplaced,
        misplaced_usual=placed.misplaced_usual,
        why=placed.why,
        beyond_rows=beyond_rows,
    )


@dataclass(frozen=True)
class _Placed:
    """What the levels of a tensor's blocks say, or its scale and offset."""

    limit: float  # of the error
    misplaced: float | None = None
    misplaced_usual: float = 0.0
    why: tuple[str, ...] = ()
    far: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def _placed(found: Passed, info: TensorInfo, usual: float, limit: float, floors: Floors) -> _Placed:
    """`usual` is the control's error, `limit` what the artifact's may be."""
    levels = found.levels
    if levels is None:
        return _Placed(limit) if has_levels(info.type) else _leaning(found, info, usual, limit, floors)
    far, accepted = levels.far(info.type, usual, floors), levels.usual(info.type, usual, floors)
    if not levels.misplaced <= levels.limit(info.type, usual, floors):
        return _Placed(limit, levels.misplaced, accepted, ("levels",), far)
    # Every value is where its block's scales put it: what is lost beyond the control, importance weights gave away.
    weighed = min(floors["artifact.weighed_factor"] * usual, floors["artifact.weighed_most"])
    return _Placed(max(limit, weighed), levels.misplaced, accepted, (), far)


def _leaning(found: Passed, info: TensorInfo, usual: float, limit: float, floors: Floors) -> _Placed:
    assert found.control is not None, "asked for only with a control"
    known = None if found.sample is None else np.flatnonzero(found.sample.known)
    differences = leans(found.sums, found.control, found.powers, known, info.shape[-1])
    limits = lean_limits(usual, info.n_elements, floors)
    names = zip(("scale", "offset"), differences, limits, strict=True)
    return _Placed(limit, why=tuple(name for name, value, most in names if not value <= most))


def _limit(found: Passed, floors: Floors) -> tuple[float, float]:
    """The control's error, and what the artifact's may be."""
    assert found.control is not None, "asked for only with a control"
    usual = ratio(float(found.control.error.sum()), float(found.powers.power.sum()))
    return usual, floors["artifact.tensor_factor"] * usual + floors["artifact.tensor_floor"]


def _far(found: Passed, floors: Floors) -> BoolArray:
    """Rows [n] beyond the control, in one of their blocks or, where there are enough of them, as a whole."""
    assert found.control is not None, "asked for only with a control"
    usual, _ = _limit(found, floors)
    sums, powers, control = found.sums, found.powers, found.control
    far = np.asarray(_beyond(sums.error, powers.power, control.error, usual, floors, "block").any(axis=1))
    if sums.error.shape[1] >= _LONG_ROW:
        far |= _beyond(sums.rows, powers.rows, control.rows, usual, floors, "row")
    # A block of zeros has lost exactly what was there; in types of two bits that is not beyond the factor.
    loud = powers.power > _QUIET * float(np.median(powers.power)) if powers.power.size else powers.power > 0
    far |= (loud & (sums.error == powers.power) & (control.error != powers.power)).any(axis=1)
    return far


def _beyond(
    error: Float64Array, power: Float64Array, control: Float64Array, usual: float, floors: Floors, what: str
) -> BoolArray:
    # A row far quieter than the rest is measured against the usual row, like a quiet token.
    power = np.maximum(power, _QUIET * float(np.median(power))) if power.size else power
    allowed = floors[f"artifact.{what}_factor"] * np.maximum(control, usual * power)
    return np.asarray(~(error <= np.maximum(allowed, floors[f"artifact.{what}_floor"] * power)))
