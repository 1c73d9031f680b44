"""Hypotheses tried on one place of the forward, on the engine's own input of it: the local half of `legs.explain`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffharness.errors import InconclusiveError
from diffharness.legs._graph_pass import GraphShape, PassResult, judge_pass, judged_nmse
from diffharness.legs.compare import Choice, TapComparison
from diffharness.records import TapRow
from diffharness.reference.hypotheses import Hypothesis, Place, Scene, altered, proposals
from diffharness.reference.local import Chunk, LocalForward
from diffharness.reference.steps import Steps
from diffharness.settings import Floors
from diffharness.taps import layer_tap, split

_PARTIAL = 3  # hypotheses that repair the first tap only, and are tried together with others
_DEPTH = 2  # hypotheses of one place that may be needed together
NOISE = 1e-15  # NMSE below which two values are alike

# What a hypothesis raises that makes no forward of a model or of some layer: shapes do not fit, a tensor is not there.
UNFIT = (InconclusiveError, RuntimeError, KeyError, IndexError)


class Values(Protocol):
    """The engine's values by tap; a capture is one."""

    def read(self, tap: str) -> NDArray[np.float32]: ...

    def __contains__(self, tap: object) -> bool: ...


class BudgetSpentError(Exception):
    """No more evaluations are to be made; caught where the search ends."""


@dataclass
class Budget:
    """Evaluations of one layer (or embedding, or head) that a search may make."""

    most: int
    spent: int = 0
    tried: int = 0  # hypotheses
    exhausted: bool = False

    def spend(self, n: int = 1, *, reserve: int = 0) -> None:
        """Count `n` evaluations; BudgetSpentError if these and `reserve` more are too many."""
        if self.spent + n + reserve > self.most:
            self.exhausted = True
            raise BudgetSpentError
        self.spent += n


@dataclass(frozen=True)
class Trial:
    """One or several hypotheses on one place, and what became of the first failing tap and of the others."""

    hypotheses: tuple[Hypothesis, ...]
    model: Steps
    tap: str
    before: float
    after: float
    result: PassResult
    rank: int

    @property
    def repairs_first(self) -> bool:
        """Whether the first failing tap, and all before it, are within their floors."""
        order = [row.tap for row in self.result.rows]
        failing = [row.tap for row in self.result.failing]
        return not failing or order.index(failing[0]) > order.index(self.tap)

    @property
    def repairs_all(self) -> bool:
        return not self.result.failing

    @property
    def worst(self) -> float:
        return max((judged_nmse(row) for row in self.result.judged), default=math.inf)

    @property
    def fitted(self) -> int:
        """0: all numbers are from tables; 1 or 2: some were fitted, or many."""
        return max(h.fitted for h in self.hypotheses)

    @property
    def says(self) -> str:
        return ", and ".join(h.says for h in self.hypotheses)


@dataclass
class LocalTrials:
    """One engine's values, and models tried on them place by place."""

    forward: LocalForward
    engine: Values
    metadata: Mapping[str, Any]
    kinds: Sequence[str]
    floors: Floors
    arithmetic: Sequence[str]  # conventions that are on
    choice: Choice | None
    budget: Budget
    reserve: int = 0  # evaluations to be left for what follows

    def evaluate(self, model: Steps, place: Place, chunks: Sequence[Chunk]) -> PassResult:
        """`place` of `model`, judged; one evaluation."""
        self.budget.spend(reserve=self.reserve)
        starts, n_tokens = dict[int, int](), 0
        for chunk in chunks:
            starts[chunk.rows.start] = n_tokens
            n_tokens += len(chunk.ids)
        comparison = TapComparison(n_tokens, choice=self.choice)

        def on_tap(name: str, value: Tensor, rows: slice) -> None:
            tap = layer_tap(place, name) if isinstance(place, int) else name
            if tap in self.engine:
                ours = value.detach().cpu().numpy()
                comparison.feed(tap, starts[rows.start], self.engine.read(tap)[rows], None, ours)

        self.forward.run(model, place, chunks, on_tap)
        positions = np.concatenate([np.arange(len(chunk.ids), dtype=np.int64) for chunk in chunks])
        return judge_pass(comparison, GraphShape(self.kinds, positions), self.floors, arithmetic=self.arithmetic)

    def scene(self, model: Steps, place: Place, tap: str, chunk: Chunk) -> Scene:
        """Both sides' values at `place` for one chunk, and what its attention is made of."""
        ours: dict[str, Tensor] = {}
        heads: dict[str, Tensor] = {}
        qkv: list[Tensor] = []
        sinks_of: list[Tensor] = []

        def turn(me: Steps, plain: Any, il: int, name: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            if il == place:
                heads[name] = x
            turned: Tensor = plain(il, name, x, cos, sin)
            return turned

        def attend(me: Steps, plain: Any, il: int, q: Tensor, k: Tensor, v: Tensor, state: Any, *sinks: Any) -> Tensor:
            if il == place:
                qkv[:] = [q, k, v]
                sinks_of[:] = [one for one in sinks if one is not None]
            context: Tensor = plain(il, q, k, v, state, *sinks)
            return context

        watched = altered(model, turn=turn, attend=attend)
        self.forward.run(watched, place, [chunk], lambda name, value, rows: ours.__setitem__(name, value))
        engine = {}
        for name in ours:
            full = layer_tap(place, name) if isinstance(place, int) else name
            if full in self.engine:
                engine[name] = torch.from_numpy(np.array(self.engine.read(full)[chunk.rows])).to(ours[name])
        if place != "embed":
            ours["input"] = self.forward.input(place, chunk.rows)[0]
        return Scene(
            model=model,
            weights=self.forward.weights,
            metadata=self.metadata,
            place=place,
            tap=split(tap)[1],
            tokens=torch.from_numpy(chunk.ids.astype(np.int64)).to(self.forward.weights.device),
            ours=ours,
            engine=engine,
            heads=heads,
            qkv=(qkv[0], qkv[1], qkv[2]) if qkv else None,
            sinks=sinks_of[0] if sinks_of else None,
        )

    def search(
        self, model: Steps, place: Place, chunks: Sequence[Chunk], before: PassResult | None = None, depth: int = 0
    ) -> list[Trial]:
        """Hypotheses, or pairs of them, that bring every tap of `place` to its floor; the likeliest first.

        Where there are none, those that do so with the first failing tap and all before it.
        """
        before = before or self.evaluate(model, place, chunks)
        first = next(iter(before.failing), None)
        if first is None:
            return []
        trials = self._trials(model, place, chunks, first)
        whole = [trial for trial in trials if trial.repairs_all]
        if whole or depth + 1 >= _DEPTH:
            return ranked(whole)
        pairs = []
        partial = ranked([trial for trial in trials if trial.repairs_first])[:_PARTIAL]
        for trial in partial:
            for more in self.search(trial.model, place, chunks, trial.result, depth + 1):
                both = (*trial.hypotheses, *more.hypotheses)
                pairs.append(replace(more, hypotheses=both, tap=trial.tap, before=trial.before, after=trial.after))
        return ranked(pairs) if pairs or depth else partial

    def _trials(self, model: Steps, place: Place, chunks: Sequence[Chunk], first: TapRow) -> list[Trial]:
        scene = self.scene(model, place, first.tap, chunks[0])
        before, trials = judged_nmse(first), list[Trial]()
        seen = {_numbers(model)}
        for rank, (_, hypothesis) in enumerate(_distinct(scene)):
            try:
                changed = hypothesis.apply(model)
                numbers = _numbers(changed)
                if numbers in seen and numbers != _numbers(model):
                    continue  # another scope, the same layers
                seen.add(numbers)
                result = self.evaluate(changed, place, chunks)
            except BudgetSpentError:
                break
            except UNFIT:
                continue
            self.budget.tried += 1
            row = next((row for row in result.rows if row.tap == first.tap), None)
            if row is not None:
                after = judged_nmse(row)
                trials.append(Trial((hypothesis,), changed, first.tap, before, after, result, rank))
        return trials


def _numbers(model: Steps) -> tuple[object, ...]:
    """What a model states of its layers."""
    return tuple((model.rotary(il), model.scores(il)) for il in range(model.n_layer))


def _distinct(scene: Scene) -> list[tuple[str, Hypothesis]]:
    """Proposals without those that say what an earlier one says."""
    seen = dict[str, tuple[str, Hypothesis]]()
    for theme, hypothesis in proposals(scene):
        seen.setdefault(hypothesis.says, (theme, hypothesis))
    return list(seen.values())


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Those that leave hardly more than the best first; among them as proposed, fitted ones last."""
    best = min((trial.after for trial in trials if trial.fitted < 2), default=0.0)

    def key(trial: Trial) -> tuple[bool, bool, float, int]:
        near = alike(trial.after, best)
        return trial.fitted >= 2, not near, trial.fitted if near else trial.after, trial.rank

    return sorted(trials, key=key)


def alike(after: float, best: float) -> bool:
    """Whether an error is hardly more than the best one."""
    return after <= max(10 * best, NOISE)
