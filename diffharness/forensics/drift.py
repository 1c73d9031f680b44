"""How far each tensor of an artifact is from the checkpoint's, against what its type loses anyway.

The measure is relative: NMSE of the artifact's values, the checkpoint's below the line. The control
is the checkpoint's own tensor quantized afresh to the same type by ggml's quantizer. A tensor is far
when its error is beyond the control's by more than importance weights explain, over the whole tensor,
in any one row or in any block of a row (a damaged block disappears in the mean of a large tensor and
in that of a long row). F32, F16 and BF16 lose only their rounding, so every single value is judged. Two
or three tensors are in memory at a time.

Floors: `artifact.tensor_factor`, `artifact.tensor_floor`, and factor and floor of `artifact.row` and `artifact.block`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffharness.forensics.rounding import STEP, far_values, roundings
from diffharness.records import TensorRow
from diffharness.settings import Floors
from diffharness.taps import split
from diffharness.weights.source import Float32Array, WeightSource

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_BLOCK_ELEMENTS = 1 << 21
_LONG_ROW = 4  # blocks from which on a row's mean says more than its worst block
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"


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
    exact: bool = False  # bit for bit the control

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
        return 0.0 if self.control is None and np.isfinite(self.error) else max(0.0, self.error - (self.control or 0.0))

    @property
    def judged(self) -> bool:
        return self.control is not None or not np.isfinite(self.error)

    @property
    def damaged(self) -> bool:
        return not self.error <= self.limit or self.far_rows > 0

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
    artifact: WeightSource, checkpoint: WeightSource, control: WeightSource | None, floors: Floors
) -> Drift:
    """Compare tensor by tensor, in the artifact's order.

    Without a control (or where it lacks a tensor of the same type) tensors kept as F32, F16 and BF16
    are still judged, by rounding the checkpoint's values; of the others only the error is given. A
    tied head may be stored on one side only; it is then compared with the embedding.
    """
    errors: list[TensorError] = []
    extra: list[str] = []
    for name in artifact.tensors:
        other = _counterpart(name, checkpoint)
        if other is None:
            extra.append(name)
        else:
            errors.append(_tensor_error(artifact, name, checkpoint, other, control, floors))
    missing = [name for name in checkpoint.tensors if name not in artifact.tensors]
    if _HEAD in missing and _EMBEDDING in artifact.tensors:
        missing.remove(_HEAD)
        errors.append(_tensor_error(artifact, _EMBEDDING, checkpoint, _HEAD, control, floors, called=_HEAD))
    return Drift(errors, missing, extra)


def _counterpart(name: str, source: WeightSource) -> str | None:
    if name in source.tensors:
        return name
    return _EMBEDDING if name == _HEAD and _EMBEDDING in source.tensors else None


def _tensor_error(
    artifact: WeightSource,
    name: str,
    checkpoint: WeightSource,
    other: str,
    control: WeightSource | None,
    floors: Floors,
    called: str | None = None,
) -> TensorError:
    info = artifact.tensors[name]
    theirs = checkpoint.tensors[other]
    if info.shape != theirs.shape:
        note = f"shape {info.shape} in the artifact, {theirs.shape} in the checkpoint"
        return TensorError(called or name, info.type, info.shape, float("inf"), None, 0.0, 0, 0, None, 0.0, note)
    a, b, explained = artifact.read(name), checkpoint.read(other), None
    if info.type in STEP:
        sums, explained = _nearest_rounding(a, b, info.type)
    else:
        c = _quantized_alike(name, info.type, b.shape, control if called is None else None)
        sums = _row_sums(_rows(a), _rows(b), None if c is None else _rows(c))
    error = _ratio(float(sums.error.sum()), float(sums.power.sum()))
    control_error = None if sums.control is None else _ratio(float(sums.control.sum()), float(sums.power.sum()))
    limit = float("inf")
    far = np.zeros(len(sums.error), dtype=np.bool_)
    if control_error is not None:
        limit = floors["artifact.tensor_factor"] * control_error + floors["artifact.tensor_floor"]
        far = sums.far_values | _far(sums, control_error, floors)
    return TensorError(
        name=called or name,
        type=info.type,
        shape=info.shape,
        error=error,
        control=control_error,
        cos=sums.cosine,
        non_finite=sums.non_finite,
        far_rows=int(far.sum()),
        worst_row=int(np.nan_to_num(sums.error, nan=np.inf).argmax()) if len(sums.error) else None,
        limit=limit,
        note=explained,
        exact=sums.exact,
    )


def _far(sums: _RowSums, usual: float, floors: Floors) -> BoolArray:
    """Rows [n] beyond the control, in one of their blocks or, where there are enough of them, as a whole."""
    assert sums.control is not None and sums.block_control is not None, "asked for only with a control"
    blocks = _beyond(sums.block_error, sums.block_power, sums.block_control, usual, floors, "block")
    far = np.asarray(blocks.any(axis=1))
    if sums.block_error.shape[1] >= _LONG_ROW:
        far |= _beyond(sums.error, sums.power, sums.control, usual, floors, "row")
    return far


def _beyond(
    error: Float64Array, power: Float64Array, control: Float64Array, usual: float, floors: Floors, what: str
) -> BoolArray:
    # A row far quieter than the rest is measured against the usual row, like a quiet token.
    power = np.maximum(power, 1e-2 * float(np.median(power)))
    allowed = floors[f"artifact.{what}_factor"] * np.maximum(control, usual * power)
    return np.asarray(~(error <= np.maximum(allowed, floors[f"artifact.{what}_floor"] * power)))


def _quantized_alike(
    name: str, type_name: str, shape: tuple[int, ...], control: WeightSource | None
) -> Float32Array | None:
    """The control's tensor; None where it has none of that type."""
    if control is None or name not in control.tensors:
        return None
    info = control.tensors[name]
    return control.read(name) if (info.type, info.shape) == (type_name, shape) else None


def _nearest_rounding(a: Float32Array, b: Float32Array, type_name: str) -> tuple[_RowSums, str | None]:
    """Against the checkpoint's rounding in the artifact's type, or the first on the way to which `a` is all near."""
    far = far_values(b, type_name)
    first = None
    for note, values in roundings(b, type_name):
        sums = _row_sums(_rows(a), _rows(b), _rows(values), far)
        if not sums.far_values.any():
            return sums, note
        first = first or sums
    assert first is not None, "the type's own rounding comes first"
    return first, None


@dataclass
class _RowSums:
    block_error: Float64Array  # [rows, blocks], of (a - b)^2
    block_power: Float64Array  # of b^2
    block_control: Float64Array | None  # of (c - b)^2
    far_values: BoolArray  # [rows], where any value is far from c by itself
    cosine: float
    non_finite: int
    exact: bool  # a is c

    @property
    def error(self) -> Float64Array:
        return np.asarray(self.block_error.sum(axis=1))

    @property
    def power(self) -> Float64Array:
        return np.asarray(self.block_power.sum(axis=1))

    @property
    def control(self) -> Float64Array | None:
        return None if self.block_control is None else np.asarray(self.block_control.sum(axis=1))


def _rows(values: Float32Array) -> Float32Array:
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(1, -1)


def _blocks_per_row(width: int) -> int:
    """Into how many equal blocks of 128 to 512 values a row is cut; 1 where that does not come out even."""
    return next((width // size for size in (256, *range(255, 127, -1), *range(257, 513)) if width % size == 0), 1)


def _row_sums(
    a: Float32Array,
    b: Float32Array,
    c: Float32Array | None,
    far: Callable[[Float32Array, Float32Array], BoolArray] | None = None,
) -> _RowSums:
    n, n_blocks = len(a), _blocks_per_row(a.shape[1])
    error, power, control = (np.zeros((n, n_blocks)) for _ in range(3))
    far_rows = np.zeros(n, dtype=np.bool_)
    dot = power_a = 0.0
    non_finite, exact = 0, c is not None
    step = max(1, _BLOCK_ELEMENTS // max(1, a.shape[1]))

    def squares(x: Float64Array) -> Float64Array:
        x = x.reshape(len(x), n_blocks, -1)
        return np.asarray(np.einsum("ijk,ijk->ij", x, x))

    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        x, y = a[rows].astype(np.float64), b[rows].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            non_finite += int((~np.isfinite(x)).sum())
            dot += float(np.vdot(x, y))
            power_a += float(np.vdot(x, x))
            power[rows] = squares(y)
            x -= y
            error[rows] = squares(x)
            if c is not None:
                np.subtract(c[rows], y, out=y)
                control[rows] = squares(y)
                exact = exact and bool((a[rows] == c[rows]).all())
                if far is not None and not exact:
                    far_rows[rows] = far(a[rows], c[rows]).any(axis=1)
    norm = float(np.sqrt(power_a) * np.sqrt(power.sum()))
    cosine = dot / norm if np.isfinite([dot, norm]).all() and norm > 0 else float(power_a == power.sum())
    return _RowSums(
        block_error=error,
        block_power=power,
        block_control=None if c is None else control,
        far_values=far_rows,
        cosine=min(1.0, max(-1.0, cosine)),
        non_finite=non_finite,
        exact=exact,
    )


def _ratio(error: float, power: float) -> float:
    if not np.isfinite([error, power]).all():
        return float("inf")
    if error == 0.0:
        return 0.0
    return error / power if power > 0.0 else float("inf")
