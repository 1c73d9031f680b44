"""One pass of the reference against the strict engine, judged tap by tap; the graph leg makes its verdict of two.

Floors (`configs/tolerances.yaml`): `graph.local` for a tap over all tokens, `graph.local_token` for
any one token of it, `graph.logits` for the logits end to end. `graph.local.<tap>` and
`graph.local_token.<tap>` override the first two for one tap, named without its layer. Behind a table of
GELU, whose steps are coarse, `graph.gelu_token.<tap>` holds for a token, and `graph.isolated_share` of the
tokens may be left out of the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffharness.errors import InconclusiveError
from diffharness.layers import buckets, describe_layers, describe_positions, ranges
from diffharness.legs.compare import BoolArray, Float64Array, TapComparison, TapErrors, logit_stats
from diffharness.metrics import LogitComparison
from diffharness.records import GraphPass, LayerRow, LogitStats, PositionRow, TapRow
from diffharness.settings import Floors
from diffharness.taps import LAYER_TAPS, layer_tap, split

IntArray = NDArray[np.int64]

_AFTER_ROUTER = frozenset(LAYER_TAPS[LAYER_TAPS.index("moe_logits") + 1 :])
_AFTER_GELU = frozenset(LAYER_TAPS[LAYER_TAPS.index("ffn_act") :])


@dataclass(frozen=True)
class GraphShape:
    """What the leg must know of the model and the run, beside the numbers."""

    kinds: Sequence[str]  # by layer, as the architecture calls it: `global`, `sliding`
    positions: IntArray  # [n_tokens] position of each row within its chunk
    landmarks: Mapping[str, int] = field(default_factory=dict)  # such as {"the window": 512, "n_ubatch": 512}

    @property
    def length(self) -> int:
        """Tokens of the longest chunk."""
        return int(self.positions.max(initial=-1)) + 1

    @property
    def chunk_of(self) -> IntArray:
        """[n_tokens] number of the chunk that each row belongs to."""
        return np.cumsum(self.positions == 0, dtype=np.int64) - 1


@dataclass(frozen=True)
class PassResult:
    """One pass of the reference against the strict engine, judged."""

    arithmetic: tuple[str, ...]  # conventions that were on
    rows: list[TapRow]  # in graph order
    per_layer: list[LayerRow]
    per_position: list[PositionRow]
    affected: str | None
    logits: LogitStats | None
    logits_floor: float
    complete: bool  # every layer's output and the logits were compared locally
    router_ties: int
    non_finite: dict[str, dict[str, int]]  # by tap, then `engine` and `reference`
    positions: IntArray

    @property
    def failing(self) -> list[TapRow]:
        return [row for row in self.rows if row.ok is False]

    @property
    def judged(self) -> list[TapRow]:
        return [row for row in self.rows if row.ok is not None]

    @property
    def logits_ok(self) -> bool:
        """Whether the logits were compared end to end, and agree."""
        return self.logits is not None and self.logits.nmse <= self.logits_floor

    @property
    def ok(self) -> bool:
        """Locally within the floors; end to end decides only where the local comparison has holes."""
        return not self.failing and (self.complete or self.logits_ok)

    @property
    def undecided(self) -> bool:
        """Nothing fails, but some layers were not compared locally and no logits speak for them."""
        return not self.failing and not self.complete and self.logits is None

    def summary(self) -> GraphPass:
        worst = max(self.judged, key=judged_nmse, default=None)
        return GraphPass(
            arithmetic=list(self.arithmetic),
            ok=self.ok,
            logits=self.logits,
            worst_local=None if worst is None else judged_nmse(worst),
            worst_tap=None if worst is None else worst.tap,
            failing=[row.tap for row in self.failing],
        )


def judge_pass(
    comparison: TapComparison,
    shape: GraphShape,
    floors: Floors,
    *,
    arithmetic: Sequence[str] = (),
    logits: LogitComparison | None = None,
) -> PassResult:
    """Judge one pass. `logits` compares the scored positions end to end (rows are fixture rows)."""
    rows: list[TapRow] = []
    series: list[tuple[TapErrors, Float64Array, float]] = []
    ties: dict[int, BoolArray] = {}
    isolated = 0
    by_table = any(name.startswith("gelu") for name in arithmetic)
    if by_table:
        isolated = max(1, int(floors.get("graph.isolated_share", 0.0) * comparison.n_tokens))
    for errors in comparison.taps:
        layer, name = split(errors.tap)
        floor, token_floor = _floor("graph.local", name, floors), _floor("graph.local_token", name, floors)
        if by_table:
            token_floor = floors.get(f"graph.gelu_token.{name}", token_floor)
        if name == "moe_logits" and layer is not None:
            flipped = comparison.flipped(layer)
            if flipped is not None:
                # Where the router agrees within its floor, another choice of experts is a near tie.
                ties[layer] = flipped & (errors.judged.per_token() <= token_floor)
        keep = ~ties[layer] if layer in ties and name in _AFTER_ROUTER else None
        nothing_left = keep is not None and not (errors.judged.seen & keep).any()
        # Without the engine's layer input an error may come from any earlier layer.
        if nothing_left or not (errors.local is not None or layer == 0 or name == "token_embd"):
            rows.append(errors.row(keep=keep))
            continue
        rows.append(errors.row(floor, token_floor, keep, isolated if name in _AFTER_GELU else 0))
        tokens = errors.judged.per_token()
        series.append((errors, tokens if keep is None else np.where(keep, tokens, 0.0), token_floor))
    if not series:
        raise InconclusiveError(
            "no tap could be compared locally: the engine gave none of the layers' inputs",
            hint="check that the engine exposes token_embd and layer_out",
        )
    suspects = _suspect_tokens(series, shape)
    return PassResult(
        arithmetic=tuple(arithmetic),
        rows=rows,
        per_layer=_per_layer(rows, shape),
        per_position=_per_position(series, shape, logits),
        affected=_affected([row.tap for row in rows if row.ok is False], suspects, shape),
        logits=None if logits is None else logit_stats(logits),
        logits_floor=floors["graph.logits"],
        complete=_complete({row.tap for row in rows if row.ok is not None}, len(shape.kinds)),
        router_ties=sum(int(tie.sum()) for tie in ties.values()),
        non_finite={e.tap: dict(e.non_finite) for e in comparison.taps if any(e.non_finite.values())},
        positions=shape.positions,
    )


# -- parts --------------------------------------------------------------------------------------------


def _floor(kind: str, tap: str, floors: Floors) -> float:
    return floors.get(f"{kind}.{tap}", floors[kind])


def judged_nmse(row: TapRow) -> float:
    """The number that a floor is held against: local where there is one."""
    value = row.nmse if row.nmse_local is None else row.nmse_local
    return float("inf") if value is None or np.isnan(value) else value


def _complete(judged: set[str], n_layer: int) -> bool:
    return {"logits", *(layer_tap(il, "layer_out") for il in range(n_layer))} <= judged


def _per_layer(rows: Sequence[TapRow], shape: GraphShape) -> list[LayerRow]:
    by_layer: dict[int, list[TapRow]] = {}
    for row in rows:
        layer, _ = split(row.tap)
        if layer is not None and row.ok is not None:
            by_layer.setdefault(layer, []).append(row)
    summary = []
    for layer, of_layer in sorted(by_layer.items()):
        worst = max(of_layer, key=judged_nmse)
        summary.append(
            LayerRow(
                layer=layer,
                kind=shape.kinds[layer] if layer < len(shape.kinds) else "unknown",
                nmse_local=judged_nmse(worst),
                tap=worst.tap,
                ok=all(row.ok for row in of_layer),
            )
        )
    return summary


def _per_position(
    series: Sequence[tuple[TapErrors, Float64Array, float]], shape: GraphShape, logits: LogitComparison | None
) -> list[PositionRow]:
    kl_at = None if logits is None else shape.positions[logits.rows]
    rows = []
    for start, stop in buckets(shape.length, list(shape.landmarks.values())):
        inside = (shape.positions >= start) & (shape.positions < stop)
        peaks = [(float(tokens[inside].max(initial=0.0)), errors.tap) for errors, tokens, _ in series]
        worst, tap = max(peaks, key=lambda peak: peak[0])
        kl = None
        if logits is not None and kl_at is not None:
            scored = logits.kl_series[(kl_at >= start) & (kl_at < stop)]
            kl = float(scored.mean()) if scored.size else None
        ok = all(bool((tokens[inside] <= floor).all()) for _, tokens, floor in series)
        rows.append(PositionRow(start=start, stop=stop, nmse_local=worst, tap=tap, kl_mean=kl, ok=ok))
    return rows


def _suspect_tokens(series: Sequence[tuple[TapErrors, Float64Array, float]], shape: GraphShape) -> BoolArray:
    """Tokens at which any tap leaves its floor: [n_tokens]."""
    above = np.zeros(len(shape.positions), dtype=np.bool_)
    for _, tokens, floor in series:
        above |= ~(tokens <= floor)
    return above


def _affected(failing: Sequence[str], suspects: BoolArray, shape: GraphShape) -> str | None:
    """`only sliding layers (0-4), only positions >= 64 (the window)`; None if nothing fails."""
    if not failing:
        return None
    layers = {layer for layer, _ in map(split, failing) if layer is not None}
    outside = [tap for tap in failing if split(tap)[0] is None]
    parts = [describe_layers(layers, shape.kinds)] if layers else []
    if outside:
        parts.append(("and " if layers else "outside of the layers: ") + ", ".join(outside))
    if suspects.any():
        parts.append(describe_positions(int(shape.positions[suspects].min()), shape.length, shape.landmarks))
        chunks = set(shape.chunk_of[suspects].tolist())
        n_chunks = int(shape.chunk_of.max(initial=0)) + 1
        if len(chunks) < n_chunks and 0 not in chunks:
            parts.append(f"not in the first chunk (chunks {ranges(chunks)} of {n_chunks})")
    return ", ".join(parts)
