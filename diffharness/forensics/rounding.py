"""What storing a tensor as F32, F16 or BF16 may do to its values: exact rounding, so that every single value is judged.

No importance weights enter here, unlike with quantized types: a converter has no choice but the rounding,
and where it rounded on the way (a float32 checkpoint merged or saved in 16 bits before it was converted)
it says so in every value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diffharness.weights.dequant import dequantize
from diffharness.weights.gguf_write import encode_floats
from diffharness.weights.source import Float32Array

# How far a value may be from the rounded checkpoint's, relative to it: one step of the type, since some
# converters cut off what others round; in F32 the order of one addition (a norm stored less one).
STEP = {"F32": 1e-6, "F64": 1e-6, "F16": 2.0**-10, "BF16": 2.0**-7}
_QUIET = 1e-6  # of the tensor's largest value: below that a value has no digits to be right in


def rounded(values: Float32Array, type_name: str) -> Float32Array:
    """`values` after storage in one of `STEP`'s types: what is written to a file, read back."""
    if type_name not in ("F16", "BF16"):
        return values
    with np.errstate(over="ignore"):
        return dequantize(encode_floats(values, type_name), type_name, values.shape)


Rounding = Callable[[Float32Array], Float32Array]


def ways(type_name: str, n_axes: int) -> list[tuple[str | None, Rounding]]:
    """How the values may have come into `type_name`: rounded once, or to 16 bits before.

    Each with a note on what happened on the way. Norms may have been rounded less one, as Gemma's
    checkpoints keep them.
    """

    def through(via: str, less: int) -> Rounding:
        return lambda values: rounded(rounded(values - less, via) + less if less else rounded(values, via), type_name)

    found: list[tuple[str | None, Rounding]] = [(None, lambda values: rounded(values, type_name))]
    for via in ("BF16", "F16"):
        if via == type_name:
            continue
        note = f"the checkpoint's values rounded to {via}"
        found.append((note, through(via, 0)))
        if n_axes == 1:
            found.append((note, through(via, 1)))
    return found


def largest(values: Float32Array) -> float:
    """The largest finite magnitude."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def far_values(peak: float, type_name: str) -> Callable[[Float32Array, Float32Array], NDArray[np.bool_]]:
    """A test of rows of the artifact against rows of a rounding: which elements are further than a step.

    `peak` is the tensor's largest magnitude.
    """
    quiet = _QUIET * peak
    step = STEP[type_name]

    def far(a: Float32Array, b: Float32Array) -> NDArray[np.bool_]:
        with np.errstate(invalid="ignore", over="ignore"):
            near = (np.abs(a - b) <= step * np.abs(b) + quiet) & np.isfinite(b)  # anything is near infinity
            return np.asarray(~(near | (a == b)))

    return far
