"""Two sides' taps compared while they stream by: only sums per token are kept, never the values.

The reference yields a tap's rows block by block; the engine's rows come from its capture. For each
tap there are up to two comparisons: *own*, end to end, and *local*, where the reference layer was fed
the engine's own layer input. NMSE is the definition of `diffharness.metrics`, the reference below
the line; a value that is not finite makes the error infinite. Squares are summed in the inputs' own
precision (float64 where float32 would overflow or lose them), so that a run of a thousand taps costs
little more than reading them; errors are good to five digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.errors import InconclusiveError
from diffharness.metrics import LogitComparison, ratio
from diffharness.records import LogitStats, TapRow, Unmatched
from diffharness.row_sums import LARGEST, least_power, row_sums
from diffharness.taps import graph_order, split
from diffharness.words import listed

FloatArray = NDArray[np.floating[Any]]
Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

Choice = Callable[[int, FloatArray], NDArray[np.integer[Any]]]
"""A layer's number and its router's logits [n, n_expert] to the experts of each token [n, n_used], in any order."""

_BLOCK_ELEMENTS = 1 << 18  # a difference that stays in the cache


class _Sums:
    """Per-token sums of one comparison of [n_tokens, width] values."""

    def __init__(self, n_tokens: int) -> None:
        self.seen: BoolArray = np.zeros(n_tokens, dtype=np.bool_)
        self.error = np.zeros(n_tokens)
        self.power = np.zeros(n_tokens)
        self.dot = self.power_a = self.max_abs = 0.0

    def add(self, start: int, a: FloatArray, b: FloatArray) -> None:
        step = max(1, _BLOCK_ELEMENTS // max(1, a.shape[1]))
        for i in range(0, len(a), step):
            self._add(start + i, a[i : i + step], b[i : i + step])

    def _add(self, start: int, a: FloatArray, b: FloatArray) -> None:
        rows = slice(start, start + len(a))
        sums, power_a = row_sums(a, b), _dot(a, a)
        if not (sums.in_range and power_a < LARGEST):
            a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
            sums, power_a = row_sums(a, b), _dot(a, a)
        self.error[rows], self.power[rows] = sums.error, sums.power
        self.dot += _dot(a, b)
        self.power_a += power_a
        self.max_abs = max(self.max_abs, sums.largest)
        self.seen[rows] = True

    def nmse(self, keep: BoolArray | None = None) -> float:
        use = self.seen if keep is None else self.seen & keep
        if not use.any():
            return 0.0
        return float(ratio(self.error[use].sum(keepdims=True), self.power[use].sum(keepdims=True))[0])

    def per_token(self) -> Float64Array:
        """NMSE by token [n_tokens], quiet tokens against the usual power; 0 for tokens not seen."""
        result = np.zeros(len(self.seen))
        if self.seen.any():
            power = self.power[self.seen]
            result[self.seen] = ratio(self.error[self.seen], np.maximum(power, least_power(power)))
        return result

    def cosine(self) -> float:
        power_b = float(self.power[self.seen].sum())
        if not np.isfinite([self.dot, self.power_a, power_b]).all():
            return 0.0
        if self.power_a == 0.0 or power_b == 0.0:
            return 1.0 if self.power_a == power_b else 0.0
        return float(np.clip(self.dot / np.sqrt(self.power_a) / np.sqrt(power_b), -1.0, 1.0))


def _dot(a: FloatArray, b: FloatArray) -> float:
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return float(np.vdot(a, b))


@dataclass
class TapErrors:
    """What is known of one tap. `local` is None where the reference had no local value to give."""

    tap: str
    own: _Sums | None
    local: _Sums | None
    non_finite: dict[str, int] = field(default_factory=lambda: {"engine": 0, "reference": 0})

    @property
    def judged(self) -> _Sums:
        """The comparison that decides: local where there is one."""
        sums = self.local or self.own
        assert sums is not None, "a tap without any comparison is never made"
        return sums

    def row(
        self,
        floor: float | None = None,
        token_floor: float | None = None,
        keep: BoolArray | None = None,
        isolated: int = 0,
    ) -> TapRow:
        """The tap as a row of the table; `keep` [n_tokens] leaves tokens out of the judgement.

        Without floors nothing is judged: `ok` and `first_token` stay null. Where the mean is above its floor, up
        to `isolated` tokens may be left out of it, the worst ones; their own floor they must still keep.
        """
        tokens = self.judged.per_token()
        if keep is not None:
            tokens = np.where(keep, tokens, 0.0)
        worst = int(tokens.argmax()) if tokens.size else None
        whole = self.own or self.judged
        kept = keep
        if floor is not None and isolated and self.judged.nmse(keep) > floor:
            without = self._without_worst(tokens, keep, isolated)
            kept = without if self.judged.nmse(without) <= floor else keep
        local = self.local.nmse(kept) if self.local else None
        row = TapRow(
            tap=self.tap,
            nmse=self.own.nmse() if self.own else None,
            nmse_local=local,
            cos=whole.cosine(),
            max_abs=whole.max_abs,
            worst_token=worst,
            worst_token_nmse=None if worst is None else float(tokens[worst]),
            floor=floor,
            left_out=0 if kept is None else int((self.judged.seen & ~kept).sum()),
        )
        if floor is not None and token_floor is not None:
            above = np.flatnonzero(~(tokens <= token_floor))
            row.ok = bool(above.size == 0 and self.judged.nmse(kept) <= floor)
            if not row.ok:
                row.first_token = int(above[0]) if above.size else worst
        return row

    def _without_worst(self, tokens: Float64Array, keep: BoolArray | None, count: int) -> BoolArray:
        """`keep` less the tokens that make most of the error."""
        kept = self.judged.seen.copy() if keep is None else self.judged.seen & keep
        error = np.where(kept & np.isfinite(tokens), self.judged.error, -1.0)
        kept[np.argsort(error)[-min(count, len(error) - 1) :]] = False
        return kept


class TapComparison:
    """Feed it every tap as the reference streams by; read rows in graph order at the end.

    `choice` is how a model that routes chooses experts: from `moe_logits` it follows which tokens took
    others on the two sides.
    """

    def __init__(self, n_tokens: int, *, choice: Choice | None = None) -> None:
        self.n_tokens = n_tokens
        self._choice = choice
        self._taps: dict[str, TapErrors] = {}
        self._flips: dict[int, BoolArray] = {}  # by layer: tokens whose local choice of experts differs

    def feed(
        self,
        tap: str,
        start: int,
        engine: FloatArray,
        own: FloatArray | None,
        local: FloatArray | None = None,
    ) -> None:
        """Rows start .. start + len(engine) of one tap, each [rows, width]; in any order, each row once."""
        if own is None and local is None:
            raise ValueError(f"{tap}: neither an own nor a local value to compare with")
        for side in (own, local):
            if side is not None and side.shape != engine.shape:
                raise InconclusiveError(
                    f"{tap}: the engine's value has shape {engine.shape}, the reference's {side.shape}",
                    hint="the map from ggml's node names to taps does not fit this engine build",
                )
        if start < 0 or start + len(engine) > self.n_tokens:
            raise ValueError(f"{tap}: rows {start} to {start + len(engine)} lie outside of {self.n_tokens} tokens")
        entry = self._taps.get(tap)
        if entry is None:
            entry = self._taps[tap] = TapErrors(
                tap,
                _Sums(self.n_tokens) if own is not None else None,
                _Sums(self.n_tokens) if local is not None else None,
            )
        entry.non_finite["engine"] += int((~np.isfinite(engine)).sum())
        reference = own if own is not None else local
        assert reference is not None
        entry.non_finite["reference"] += int((~np.isfinite(reference)).sum())
        if own is not None and entry.own is not None:
            entry.own.add(start, engine, own)
        if local is not None and entry.local is not None:
            entry.local.add(start, engine, local)
        layer, name = split(tap)
        if name == "moe_logits" and layer is not None and local is not None and self._choice:
            flips = self._flips.setdefault(layer, np.zeros(self.n_tokens, dtype=np.bool_))
            flips[start : start + len(engine)] = other_experts(engine, local, layer, self._choice)

    @property
    def taps(self) -> list[TapErrors]:
        """Everything fed, in graph order."""
        return [self._taps[name] for name in sorted(self._taps, key=graph_order)]

    def get(self, tap: str) -> TapErrors | None:
        return self._taps.get(tap)

    def flipped(self, layer: int) -> BoolArray | None:
        """Tokens of a layer whose experts differ between engine and local reference; None without a router."""
        return self._flips.get(layer)


def highest(top_k: int) -> Choice:
    """The choice of the `top_k` experts with the highest logits."""
    return lambda layer, logits: np.argsort(-logits, axis=1, kind="stable")[:, :top_k]


def other_experts(a: FloatArray, b: FloatArray, layer: int, choice: Choice) -> BoolArray:
    """Which rows of two [n, n_expert] router logits of a layer choose another set of experts: [n]."""
    ours, theirs = (np.sort(choice(layer, x), axis=1) for x in (a, b))
    return np.asarray((ours != theirs).any(axis=1))


def unmatched(engine: Iterable[str], reference: Iterable[str]) -> Unmatched:
    """Taps that only one side has, in graph order; InconclusiveError if the two share none."""
    ours, theirs = set(reference), set(engine)
    if not ours & theirs:
        raise InconclusiveError(
            f"no tap of the engine matches one of the reference: engine {_some(theirs)}; reference {_some(ours)}",
            hint="the map from ggml's node names to taps does not fit this engine build or architecture",
        )
    return Unmatched(
        engine=sorted(theirs - ours, key=graph_order),
        reference=sorted(ours - theirs, key=graph_order),
    )


def _some(names: set[str], most: int = 12) -> str:
    if not names:
        return "has none"
    return listed(sorted(names, key=graph_order), most)


def logit_stats(comparison: LogitComparison) -> LogitStats:
    """The record's part of a comparison of logits."""
    return LogitStats(
        nmse=comparison.nmse,
        kl_mean=comparison.kl_mean,
        kl_p99=comparison.kl_p99,
        kl_max=comparison.kl_max,
        top1=comparison.top1,
        n=int(comparison.rows.size),
    )
