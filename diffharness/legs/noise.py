"""Noise told apart: the drift that honest kernels would cause, computed, against the drift that the engine shows.

Rounding is chaotic: a value at the boundary of two codes falls to either side, and after some layers the logits of two
honest runs have nothing of their errors in common but the size. So the reference that rounds as the engine does
(`reference.rounding`) does not tell the engine's logits; it tells how large their distance may be. The two mean KL are
compared position by position, their ratio with an interval that allows for neighbours (`diffharness.paired`).

Noise never convicts, so that no doubt makes two verdicts. Its findings are information where the graph or the kernel
leg has found a fault; else they withhold the verdict until somebody decides: `replay`, which looks at single nodes, or,
where every node was right for its inputs, `matrix`, as then the graph of these settings may be at fault.

Limits (`configs/tolerances.yaml`): `noise.kl_factor` for the lower end of the ratio's interval, with `noise.kl_floor`
added to the expected mean KL.
"""

from __future__ import annotations

import math
import shlex
from typing import Any

import numpy as np

from diffharness.layers import buckets, describe_layers
from diffharness.metrics import Flips, Float64Array, FloatArray, IntArray, LogitComparison, compare_logits, log_softmax
from diffharness.paired import paired
from diffharness.records import Finding, Status
from diffharness.records.noise import Drift, DriftPosition, DriftStats, NoiseReport
from diffharness.settings import Floors

_BLOCK_ELEMENTS = 1 << 21


def drift(
    reference: FloatArray,
    simulated: FloatArray,
    native: FloatArray,
    rows: IntArray,
    positions: IntArray,
    floors: Floors,
    *,
    simulated_all: bool = True,
    routed: bool = False,
) -> Drift:
    """Logits [n_tokens, n_vocab] of the three sides at the scored `rows`; `positions` [n_tokens] in their chunks.

    Where not all rounding of these rows is simulated, nothing is judged. Nor does a `routed` model's excess say
    anything: one choice between experts on a near tie, made otherwise, outweighs all rounding.
    """
    measured, expected = compare_logits(reference, native, rows), compare_logits(reference, simulated, rows)
    chunk_of = (np.cumsum(positions == 0, dtype=np.int64) - 1)[rows]
    result = Drift(
        n=int(rows.size),
        measured=_stats(measured, reference, chunk_of),
        expected=_stats(expected, reference, chunk_of),
        flips_expected=_expected_flips(reference, simulated, rows),
        limit=floors["noise.kl_factor"],
        positions=_by_position(measured, expected, positions),
    )
    own, control = measured.kl_series, expected.kl_series + floors["noise.kl_floor"]
    if math.isfinite(expected.kl_mean):
        result.ratio, result.low, result.high = _ratio(own, control, chunk_of)
        within = result.low <= result.limit
        result.ok = within if within or (simulated_all and not routed) else None
    return result


def _ratio(own: Float64Array, control: Float64Array, chunk_of: IntArray) -> tuple[float, float, float]:
    """Ratio of the means with a 95 % interval: that of its logarithm, by the differences of the two relative series."""
    ratio = float(own.mean() / control.mean())
    if ratio == 0.0 or not math.isfinite(ratio):
        return ratio, ratio, ratio
    relative = paired(own / own.mean(), control / control.mean(), chunk_of)
    if relative.error is None or relative.critical is None:  # too few positions for an error
        return ratio, 0.0, math.inf
    spread = math.exp(min(relative.critical * relative.error, 700.0))
    return ratio, ratio / spread, ratio * spread


def _stats(compared: LogitComparison, reference: FloatArray, chunk_of: IntArray) -> DriftStats:
    gaps = probability_gaps(compared.flips, reference)
    return DriftStats(
        kl_mean=compared.kl_mean,
        kl_error=paired(compared.kl_series, np.zeros(compared.rows.size), chunk_of).error,
        kl_median=compared.kl_median,
        kl_p99=compared.kl_p99,
        top1=compared.top1,
        flips=int(gaps.size),
        flips_weight=float(gaps.sum()),
        worst_flip=float(gaps.max(initial=0.0)),
    )


def probability_gaps(flips: Flips, reference: FloatArray) -> Float64Array:
    """[k] by how much the reference's token is likelier, to the reference, than the other side's; 1 if not finite."""
    gaps = np.ones(flips.positions.size)
    for i, (row, mine, other) in enumerate(zip(flips.positions, flips.ref_ids, flips.other_ids, strict=True)):
        p = np.exp(log_softmax(np.asarray(reference[row : row + 1])))[0]
        if math.isfinite(flips.margins[i]) and np.isfinite(p).all():
            gaps[i] = p[mine] - p[other]
    return gaps


def _expected_flips(reference: FloatArray, simulated: FloatArray, rows: IntArray) -> float | None:
    """Sum over positions of the chance that the lead of the first token over the second is lost.

    Of each lead that chance is half the share of positions at which the simulated change of the lead is larger.
    """
    lead, change = np.empty(rows.size), np.empty(rows.size)
    step = max(1, _BLOCK_ELEMENTS // max(1, reference.shape[1]))
    for start in range(0, rows.size, step):
        at = rows[start : start + step]
        x, y = np.asarray(reference[at]), np.asarray(simulated[at])
        first_two = np.argpartition(x, -2, axis=1)[:, -2:]
        a, b = np.take_along_axis(x, first_two, axis=1), np.take_along_axis(y, first_two, axis=1)
        part = slice(start, start + len(at))
        with np.errstate(invalid="ignore"):
            lead[part] = a[:, 1].astype(np.float64) - a[:, 0]
            change[part] = b[:, 1].astype(np.float64) - b[:, 0] - lead[part]
    if not (np.isfinite(change).all() and np.isfinite(lead).all()):
        return None
    larger = rows.size - np.searchsorted(np.sort(np.abs(change)), np.abs(lead), side="right")
    return float(larger.sum() / rows.size / 2)


def _by_position(measured: LogitComparison, expected: LogitComparison, positions: IntArray) -> list[DriftPosition]:
    at = positions[measured.rows]
    found = []
    for start, stop in buckets(int(at.max()) + 1, ()):
        inside = (at >= start) & (at < stop)
        if inside.any():
            mean, control = (float(side.kl_series[inside].mean()) for side in (measured, expected))
            found.append(DriftPosition(start=start, stop=stop, measured=mean, expected=control))
    return found


# -- findings -----------------------------------------------------------------------------------------


def findings(report: NoiseReport, *, graph: Status, kernel: Status, model: str) -> list[Finding]:
    """What the report says, given how the graph and the kernel leg ended; `model` goes into commands."""
    name = shlex.quote(model)
    nodes = f"diffharness {'matrix' if kernel == 'pass' else 'replay'} {name}"
    found = [*_not_finite(report, name), *_local(report, nodes), *_drifted(report, name, nodes)]
    if "fail" in (graph, kernel):
        return [finding.model_copy(update={"kind": None, "next_step": None}) for finding in found]
    return found


def _not_finite(report: NoiseReport, model: str) -> list[Finding]:
    bad = report.non_finite
    if bad is None:
        return []
    row = report.first_row + bad.token
    near = [tap for tap in report.large if tap.layer == bad.layer]
    message = f"the native run's first value that is not finite is in {bad.tap}, token {row}"
    if near:
        message += f"; {near[0].tap} reaches {near[0].largest:.0f}, float16 holds 65504"
    return [_withheld(message, bad.model_dump() | {"token": row}, f"diffharness replay {model} --tokens {row + 1}")]


def _local(report: NoiseReport, next_step: str) -> list[Finding]:
    failing = [row for row in report.layers if not row.ok]
    if not failing or report.non_finite is not None:
        return []
    first = failing[0]
    inside = {row.layer for row in failing if row.layer is not None}
    kinds = [row.kind for row in report.layers if row.layer is not None]
    where = describe_layers(inside, kinds) if inside else "outside of the layers"
    at = "" if first.token is None else f", token {report.first_row + first.token}"
    message = (
        f"native run, each step from the engine's own values: {first.tap} differs by NMSE {first.nmse_local:.1e}{at}, "
        f"where rounding leaves {first.floor:.0e} at most ({where})"
    )
    return [_withheld(message, {"layers": [row.model_dump() for row in failing]}, next_step)]


def _drifted(report: NoiseReport, model: str, nodes: str) -> list[Finding]:
    drift = report.drift
    if drift is None or drift.ok is not False:
        return []
    measured, expected = drift.measured.kl_mean, drift.expected.kl_mean
    message = (
        f"the native run drifts further than its rounding explains: mean KL {measured:.1e}, expected {expected:.1e}, "
        f"{drift.ratio:.3g} times as much ({drift.low:.3g} to {drift.high:.3g}; at most {drift.limit:g})"
    )
    # The tokens that were looked at step by step are clean: the fault begins behind them.
    later = all(row.ok for row in report.layers) and drift.positions
    next_step = f"diffharness replay {model} --tokens {drift.positions[-1].stop + 1}" if later else nodes
    return [_withheld(message, drift.model_dump(exclude={"positions"}), next_step)]


def _withheld(message: str, evidence: dict[str, Any], next_step: str) -> Finding:
    return Finding(kind="inconclusive", leg="kernel", message=message, evidence=evidence, next_step=next_step)
