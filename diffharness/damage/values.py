"""Faults on values: a tensor's numbers are computed anew and stored in the type that it had."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffharness.damage.draft import FLOATS, Draft, Edit, Fault, Plan, Target
from diffharness.errors import BadInputError
from diffharness.weights.source import Float32Array, TensorInfo

LARGEST_F16 = 65504.0
_SMALLEST_F16 = 2.0**-25  # half of the smallest subnormal: rounds to zero

Change = Callable[[Float32Array, float, np.random.Generator], Float32Array]
Fits = Callable[[TensorInfo], str | None]  # None, or why the fault cannot be in that tensor


def _anything(info: TensorInfo) -> str | None:
    return None


def _matrix(info: TensorInfo) -> str | None:
    return None if len(info.shape) > 1 and min(info.shape[-2:]) > 1 else "it is no matrix"


def _keeps_non_finite(info: TensorInfo) -> str | None:
    return None if info.type in FLOATS else f"{info.type} cannot hold an infinite value"


def fitting(draft: Draft, target: Target, fits: Fits) -> list[str]:
    """The target's tensors that can have the fault; BadInputError if none can."""
    reasons = {name: fits(draft.contents[name].info) for name in target.names}
    found = [name for name, reason in reasons.items() if reason is None]
    if not found:
        name, reason = next(iter(reasons.items()))
        raise BadInputError(
            f"{target.fault} changes nothing: {name}: {reason}"
            + (f", nor do the other {len(reasons) - 1} tensors allow it" if len(reasons) > 1 else ""),
            hint="choose other tensors with --tensors and --layers",
        )
    return found


def _plan(change: Change, said: str, fits: Fits = _anything) -> Plan:
    """A fault of one tensor at a time; `said` may hold {strength}."""

    def plan(draft: Draft, target: Target) -> Edit:
        names = fitting(draft, target, fits)

        def content(name: str) -> Callable[[], Float32Array]:
            before = draft.contents[name]

            def values() -> Float32Array:
                after = change(before.values(), target.strength, draft.rng(target.fault, name))
                return after.astype(np.float32).reshape(before.info.shape)

            return values

        text = said.format(strength=f"{target.strength:g}")
        return Edit({name: draft.changed(name, content(name)) for name in names}, dict.fromkeys(names, text))

    return plan


def noise(values: Float32Array, decibels: float, rng: np.random.Generator) -> Float32Array:
    """Gaussian noise at a signal to noise ratio over the whole tensor."""
    power = float(np.mean(np.square(values, dtype=np.float64)))
    level = np.float32(np.sqrt(power * 10 ** (-decibels / 10)))
    return values + level * rng.standard_normal(values.shape, dtype=np.float32)


def decibels_of_cosine(cosine: float) -> float:
    """The signal to noise ratio of independent noise that leaves that cosine to the clean tensor."""
    return -10 * float(np.log10(1 / cosine**2 - 1))


def _one_value(values: Float32Array, factor: float, rng: np.random.Generator) -> Float32Array:
    flat = values.reshape(-1).copy()
    flat[rng.integers(flat.size)] = factor * np.sqrt(np.mean(np.square(flat, dtype=np.float64)))
    return flat


def _clip(values: Float32Array, share: float, rng: np.random.Generator) -> Float32Array:
    most = _quantile(values, share) if share else LARGEST_F16
    return np.clip(values, -most, most)


def _quantile(values: Float32Array, share: float) -> float:
    """The absolute value that a share of the values is above."""
    flat = np.abs(values).reshape(-1)
    kept = min(flat.size - 1, max(1, round(flat.size * (1 - share))))
    return float(np.partition(flat, kept - 1)[kept - 1])


def _overflow(values: Float32Array, share: float, rng: np.random.Generator) -> Float32Array:
    most = _quantile(values, share) if share else LARGEST_F16
    return np.where(np.abs(values) > most, np.copysign(np.float32(np.inf), values), values)


def _underflow(values: Float32Array, share: float, rng: np.random.Generator) -> Float32Array:
    return np.where(np.abs(values) <= (_quantile(values, 1 - share) if share else _SMALLEST_F16), 0, values)


def _zero_rows(values: Float32Array, share: float, rng: np.random.Generator) -> Float32Array:
    rows = values.reshape(-1, values.shape[-1]).copy()
    rows[rng.permutation(len(rows))[: max(1, round(share * len(rows)))]] = 0
    return rows


def _one_channel(values: Float32Array, factor: float, rng: np.random.Generator) -> Float32Array:
    rows = values.reshape(-1, values.shape[-1]).copy()
    rows[:, rng.integers(rows.shape[1])] *= np.float32(factor)
    return rows


def _transposed(values: Float32Array, strength: float, rng: np.random.Generator) -> Float32Array:
    return np.ascontiguousarray(np.swapaxes(values, -1, -2))


_SHARE = (0.0, 1.0)

FAULTS = [
    Fault("scale", "every value multiplied", "constant scale",
          _plan(lambda v, s, rng: v * np.float32(s), "times {strength}"), "blk.*.ffn_down*", 1.1, "the factor"),
    Fault("offset", "a constant added, as to a norm with 1 added once too often or too seldom (-1)",
          "constant offset",
          _plan(lambda v, s, rng: v + np.float32(s), "plus {strength}"), "blk.*norm*", 1.0, "what is added"),
    Fault("constant", "every value the same, as where a tensor was left at its initial value", "weights",
          _plan(lambda v, s, rng: np.full_like(v, s), "all set to {strength}"), "blk.*norm*", 1.0, "the value"),
    Fault("noise", "Gaussian noise added", "weights",
          _plan(noise, "noise at {strength} dB"), "blk.*", 10.0, "SQNR in dB"),
    Fault("one-value", "one value of each tensor replaced", "weights",
          _plan(_one_value, "one value set to {strength} times the tensor's rms"), "blk.*.ffn_down*", 100.0,
          "times the rms"),
    Fault("one-channel", "one input channel (column) multiplied", "weights",
          _plan(_one_channel, "one column times {strength}", _matrix), "blk.*.ffn_down*", 4.0, "the factor"),
    Fault("zero-rows", "rows (output channels) set to zero", "zero blocks",
          _plan(_zero_rows, "{strength} of its rows zero", _matrix), "blk.*.ffn_up*", 0.05, "share of the rows",
          _SHARE),
    Fault("transposed", "the transpose's numbers in the tensor's shape", "transposed",
          _plan(_transposed, "transposed", _matrix), "blk.*.attn_q.weight"),
    Fault("clip", "the largest values cut off, as by a converter that saturates",
          "float16 overflow", _plan(_clip, "the largest {strength} cut off"),
          "blk.*.ffn_*", 0.001, "share; 0: above 65504", _SHARE),
    Fault("f16-overflow", "values beyond float16's range infinite, as where bfloat16 went through float16",
          "file: infinite values", _plan(_overflow, "the largest {strength} infinite", _keeps_non_finite),
          "blk.*norm*,*.bias", 0.001, "share; 0: above 65504", _SHARE),
    Fault("f16-underflow", "the smallest values zero, as where they went through float16", "weights",
          _plan(_underflow, "the smallest {strength} zero"), "blk.*", 0.2, "share; 0: below 3e-8",
          _SHARE),
]  # fmt: skip
