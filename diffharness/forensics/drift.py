"""How far each tensor of an artifact is from the checkpoint's, against what its type loses anyway.

The measure is relative: NMSE of the artifact's values, the checkpoint's below the line. The control
is the checkpoint's own tensor quantized afresh to the same type by ggml's quantizer. A tensor is far
when its error is beyond the control's by more than importance weights explain, over the whole tensor
or in any one row (a damaged block disappears in the mean of a large tensor). Two or three tensors are
in memory at a time.

Floors: `artifact.tensor_factor`, `artifact.tensor_floor`, `artifact.row_factor`, `artifact.row_floor`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffharness.legs._floors import Floors
from diffharness.records import TensorRow
from diffharness.taps import split
from diffharness.weights.source import Float32Array, WeightSource

Float64Array = NDArray[np.float64]

_BLOCK_ELEMENTS = 1 << 21
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
    far_rows: int  # rows whose own error is beyond the control's
    worst_row: int | None  # the row with the largest error, counted over all leading axes
    limit: float  # what `error` may be at most
    note: str | None = None  # why it could not be measured

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
    b = checkpoint.read(other)
    a = artifact.read(name)
    c = _control_values(name, info.type, b, control if called is None else None)
    sums = _row_sums(_rows(a), _rows(b), _rows(c) if c is not None else None)
    error = _ratio(float(sums.error.sum()), float(sums.power.sum()))
    control_error = None if sums.control is None else _ratio(float(sums.control.sum()), float(sums.power.sum()))
    limit = float("inf")
    far: NDArray[np.bool_] = np.zeros(len(sums.error), dtype=np.bool_)
    if control_error is not None and sums.control is not None:
        limit = floors["artifact.tensor_factor"] * control_error + floors["artifact.tensor_floor"]
        # A row far quieter than the rest is measured against the usual row, like a quiet token.
        power = np.maximum(sums.power, 1e-2 * float(np.median(sums.power)))
        allowed = floors["artifact.row_factor"] * np.maximum(sums.control, control_error * power)
        far = ~(sums.error <= np.maximum(allowed, floors["artifact.row_floor"] * power))
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
    )


def _control_values(name: str, type_name: str, b: Float32Array, control: WeightSource | None) -> Float32Array | None:
    """The checkpoint's values after the loss of the type; None where no control knows that type's loss."""
    if control is not None and name in control.tensors:
        info = control.tensors[name]
        if info.type == type_name and info.shape == b.shape:
            return control.read(name)
    if type_name in ("F32", "F64"):
        return b
    if type_name == "F16":
        with np.errstate(over="ignore"):
            return b.astype(np.float16).astype(np.float32)
    if type_name == "BF16":
        bits = np.ascontiguousarray(b).view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) & np.uint32(0xFFFF0000)
        return rounded.view(np.float32)
    return None


@dataclass
class _RowSums:
    error: Float64Array
    power: Float64Array
    control: Float64Array | None
    cosine: float
    non_finite: int


def _rows(values: Float32Array) -> Float32Array:
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(1, -1)


def _row_sums(a: Float32Array, b: Float32Array, c: Float32Array | None) -> _RowSums:
    n = len(a)
    error, power, control = np.empty(n), np.empty(n), np.zeros(n)
    dot = power_a = 0.0
    non_finite = 0
    step = max(1, _BLOCK_ELEMENTS // max(1, a.shape[1]))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        x, y = a[rows].astype(np.float64), b[rows].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            non_finite += int((~np.isfinite(x)).sum())
            dot += float(np.vdot(x, y))
            power_a += float(np.vdot(x, x))
            power[rows] = np.einsum("ij,ij->i", y, y)
            x -= y
            error[rows] = np.einsum("ij,ij->i", x, x)
            if c is not None:
                np.subtract(c[rows], y, out=y)
                control[rows] = np.einsum("ij,ij->i", y, y)
    norm = float(np.sqrt(power_a) * np.sqrt(power.sum()))
    cosine = dot / norm if np.isfinite([dot, norm]).all() and norm > 0 else float(power_a == power.sum())
    return _RowSums(error, power, None if c is None else control, min(1.0, max(-1.0, cosine)), non_finite)


def _ratio(error: float, power: float) -> float:
    if not np.isfinite([error, power]).all():
        return float("inf")
    if error == 0.0:
        return 0.0
    return error / power if power > 0.0 else float("inf")
