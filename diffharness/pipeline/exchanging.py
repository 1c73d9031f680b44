"""Groups exchanged between artifact and checkpoint and scored: ladders in both directions, and the marks of lineage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from diffharness.errors import EngineError, OutputError
from diffharness.fixture import Fixture
from diffharness.forensics import groups as grouping
from diffharness.forensics.drift import Drift
from diffharness.forensics.groups import Group, joined
from diffharness.forensics.restore import Lineage, Outcome, Rung, additivity, is_other_lineage, ladder
from diffharness.metrics import IntArray
from diffharness.pipeline.mixed_sources import Blend
from diffharness.pipeline.mixtures import Mixtures
from diffharness.pipeline.reference_runs import Precision
from diffharness.pipeline.request import Say
from diffharness.records import MetadataRow
from diffharness.records.restore import Side
from diffharness.settings import Floors
from diffharness.weights.source import WeightSource

_SAY_EVERY = 1.0  # seconds between lines of progress


class Meter:
    """Says which forward is on and about how long the rest will take; not more often than every second."""

    def __init__(self, say: Say) -> None:
        self._say, self._started, self._said = say, 0.0, 0.0
        self.planned, self.doing = 0, ""

    def told(self, done: int) -> None:
        """Called before each forward with the number of those done."""
        now = time.monotonic()
        if done == 0:
            self._started = now
        elif now - self._said < _SAY_EVERY:
            return
        self._said = now
        left = f", {_duration((now - self._started) / done * max(1, self.planned - done))} left" if done else ""
        self._say(f"forward {done + 1} of {max(self.planned, done + 1)}{left}: {self.doing}")


class Exchange:
    """Mixtures with their outcomes at both ends, and ladders between them."""

    def __init__(self, mixtures: Mixtures, chunk_of: IntArray, floors: Floors, meter: Meter, say: Say) -> None:
        self.mixtures, self.meter = mixtures, meter
        self._chunk_of, self._floors, self._say = chunk_of, floors, say
        self.checkpoint = mixtures.of(mixtures.everything)
        meter.doing = "the artifact"
        self.artifact = mixtures.of(Group(""))

    def control(self, source: WeightSource | None) -> Outcome | None:
        """The control's outcome; None without one, or where it cannot be made."""
        if source is None:
            return None
        self.meter.doing = "the control: the checkpoint quantized afresh to the artifact's types"
        try:
            return self.mixtures.of_source(source)
        except (EngineError, OutputError) as error:
            self._say(f"no control: {error.message}")
            return None

    def ladder(self, groups: Sequence[Group], side: Side) -> list[Rung]:
        """Each group exchanged alone, put into `side`; what matters most comes first."""
        if side == "artifact":
            return self._ladder(groups, self.mixtures.of, self.artifact, "{} restored")
        return self._ladder(groups, self.mixtures.without, self.checkpoint, "{} put into the checkpoint")[::-1]

    def lineage(self, control: Outcome | None) -> Lineage:
        """What both ladders by class say, and where the differences are too large to add up, the same made small.

        For an artifact whose tensors differ from the checkpoint's all over. Of wrong metadata nothing may be seen in
        the tensors' place, so that the keys are the checkpoint's throughout.
        """
        mixtures, keys = self.mixtures, Group("", keys=self.mixtures.everything.keys)
        classes = grouping.by_class(mixtures.names)
        self._plan(2 * len(classes))
        whole = mixtures.of(keys)
        restored = self._ladder(classes, lambda group: mixtures.of(joined([group, keys])), whole, "{} restored")
        harms = self.ladder(classes, "checkpoint")
        small = None
        if math.isfinite(whole.kl_mean) and whole.kl_mean > self._floors["restore.small_kl"]:
            share = math.sqrt(self._floors["restore.small_kl"] / whole.kl_mean)
            small = self._additivity_of_small(classes, share, keys)
        return is_other_lineage(restored, harms, whole, self._floors, spread=True, control=control, small=small)

    def _additivity_of_small(self, classes: Sequence[Group], share: float, keys: Group) -> float | None:
        """Of `share` of every difference: small enough that KL goes with the square."""
        self._say(f"the same with {share:.0%} of every difference, where independent ones add up")
        self._plan(len(classes) + 1)
        small = self.mixtures.towards(Blend(self.mixtures.artifact, self.mixtures.checkpoint, share))
        self.meter.doing = "a little of everything put into the checkpoint"
        whole = small.of(keys)
        harms = self._ladder(classes, small.without, self.checkpoint, "a little of {} put into the checkpoint")
        return additivity(harms, whole, None)

    def _ladder(
        self, groups: Sequence[Group], mix: Callable[[Group], Outcome], base: Outcome, doing: str
    ) -> list[Rung]:
        self._plan(len(groups))

        def evaluate(exchanged: frozenset[Group]) -> Outcome:
            self.meter.doing = doing.format(", ".join(group.label for group in exchanged))
            return mix(joined(exchanged))

        return ladder(groups, evaluate, base, self._chunk_of, self._floors)

    def _plan(self, more: int) -> None:
        self.meter.planned = max(self.meter.planned, self.mixtures.count.forwards + more)


def exchange_of(
    artifact: WeightSource,
    checkpoint: WeightSource,
    drift: Drift,
    metadata: Sequence[MetadataRow],
    fixture: Fixture,
    precision: Precision,
    folder: Path,
    floors: Floors,
    say: Say,
    *,
    planned: int = 0,
    reuse: bool = True,
) -> Exchange:
    """Artifact and checkpoint scored, the keys on which they differ among what can be exchanged."""
    meter = Meter(say)
    meter.planned, meter.doing = planned, "the checkpoint"
    mixtures = Mixtures(
        artifact,
        checkpoint,
        fixture,
        precision,
        folder,
        keys={row.key: row.checkpoint for row in metadata},
        equal=frozenset(t.name for t in drift.tensors if t.error == 0.0),
        told=meter.told,
        reuse=reuse,
    )
    return Exchange(mixtures, fixture.scored_positions() // fixture.chunk, floors, meter, say)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
