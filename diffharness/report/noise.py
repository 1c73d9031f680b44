"""The reports' part on noise: drift expected and measured, flips, routing, and errors by layer, local and inherited."""

from __future__ import annotations

from collections.abc import Sequence

from diffharness.records import RunRecord
from diffharness.records.noise import Drift, DriftStats, NativeLayer, NoiseReport, RouterFlips
from diffharness.report._content import Table, once
from diffharness.report._format import clean, percent, scientific

MOST_LAYERS = 14


def pairs(record: RunRecord) -> list[tuple[str, str]]:
    """Label and text, the most important first; nothing where the native run was not looked at."""
    noise = record.legs.kernel.noise
    if noise is None:
        return []
    told = [
        ("Drift", None if noise.drift is None else _drift(noise.drift)),
        ("Not simulated", once(record, noise.reason)),
        ("Not finite", _not_finite(noise)),
        ("Top-1 flips", None if noise.drift is None else _flips(noise.drift)),
        ("Router flips", None if noise.router is None else _router(noise.router)),
        ("Near float16's end", _large(noise)),
    ]
    return [(label, clean(text, 600)) for label, text in told if text]


def layers(record: RunRecord, most: int | None = MOST_LAYERS) -> Table | None:
    """Local and inherited error side by side, in the order of the graph: failing rows, and every so manieth other."""
    noise = record.legs.kernel.noise
    if noise is None or not noise.layers:
        return None
    rows = noise.layers if most is None else _some(noise.layers, most)
    of = "" if len(rows) == len(noise.layers) else f", {len(rows)} of {len(noise.layers)} rows"
    title = f"Native run, {noise.tokens} tokens{of}: NMSE of each layer's own steps, and what its output inherited"
    # Heads that fold to seven or eight characters, so that the table stands in 80 columns.
    head = ("layer", "local", "at", "floor", "not rounded", "inherited", "to expect", "")
    return Table(title, head, [_row(row) for row in rows], numeric=True)


def _row(row: NativeLayer) -> tuple[str, ...]:
    return (
        clean(" ".join(("" if row.layer is None else str(row.layer), row.kind)).strip(), 25),
        scientific(row.nmse_local),
        clean((row.tap or "").split(".")[-1], 20),
        scientific(row.floor),
        scientific(row.nmse_unsimulated),
        scientific(row.nmse_inherited),
        scientific(row.nmse_expected),
        "ok" if row.ok else "fails",
    )


def _some(rows: Sequence[NativeLayer], most: int) -> list[NativeLayer]:
    """At most `most`: the first failing ones, then others evenly spread."""
    if len(rows) <= most:
        return list(rows)
    failing = [i for i, row in enumerate(rows) if not row.ok][: most // 2]
    step = (len(rows) - 1) / (most - len(failing) - 1)
    spread = {round(i * step) for i in range(most - len(failing))}
    return [rows[i] for i in sorted(spread | set(failing))]


def _drift(drift: Drift) -> str:
    measured, expected = drift.measured, drift.expected
    text = f"mean KL {_with_error(measured)}, {_with_error(expected)} expected of honest kernels"
    if drift.ratio is not None:
        between = f"{drift.low:.2g} to {drift.high:.2g}" if drift.low else "too few positions for an interval"
        text += f": {drift.ratio:.3g} times ({between}; at most {drift.limit:g})"
    text += f"; median {scientific(measured.kl_median)} and {scientific(expected.kl_median)}"
    return text + f", p99 {scientific(measured.kl_p99)} and {scientific(expected.kl_p99)}"


def _with_error(stats: DriftStats) -> str:
    error = "" if stats.kl_error is None else f" ± {stats.kl_error:.0e}"
    return scientific(stats.kl_mean) + error


def _flips(drift: Drift) -> str:
    count = "" if drift.flips_expected is None else f", {drift.flips_expected:.1f} expected by the margins"
    return (
        f"{drift.measured.flips} of {drift.n}{count}, {drift.expected.flips} in the simulation; largest lead lost "
        f"{percent(drift.measured.worst_flip)} of probability, {percent(drift.expected.worst_flip)} in the simulation"
    )


def _router(router: RouterFlips) -> str:
    text = f"{router.flipped} of {router.decisions} choices, {router.expected} in the simulation"
    if router.worst:
        worst = router.worst[0]
        text += (
            f"; over the largest margin ({percent(worst.margin)}) layer {worst.layer}, token {worst.token}: expert "
            f"{worst.taken} for {worst.dropped}"
        )
    if router.kl_flipped is not None and router.kl_others is not None:
        text += f"; mean KL of those tokens {scientific(router.kl_flipped)}, of others {scientific(router.kl_others)}"
    return text


def _not_finite(noise: NoiseReport) -> str | None:
    bad = noise.non_finite
    return (
        None if bad is None else f"first {bad.tap}, token {noise.first_row + bad.token}, {bad.count} values in the tap"
    )


def _large(noise: NoiseReport) -> str | None:
    return ", ".join(f"{tap.tap} {tap.largest:.0f}" for tap in noise.large[:4]) or None
