"""The strict engine's nodes replayed in slices of layers: each accused slice, under the whole model's numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffharness.engine.recorder import Evaluation
from diffharness.engine.slices import overrides_for
from diffharness.engine.slicing import SlicedStrict
from diffharness.legs.kernel import KernelOutcome
from diffharness.pipeline.replaying import Recording, replay_leg
from diffharness.pipeline.work import Work
from diffharness.recorded import RecordedNode, Value
from diffharness.replay.driver import Outcome
from diffharness.settings import EngineSettings
from diffharness.weights.gguf_file import open_gguf

_NUMBER = re.compile(r"(?P<before>(?:^|(?<=[^a-z]))blk\.|-|_l)(?P<layer>\d+)(?=\.| |$)")


def replay_slices(
    work: Work,
    sliced: SlicedStrict,
    layers: Collection[int | None],
    settings: EngineSettings,
    capture: Path,
    rows: slice,
) -> KernelOutcome:
    """The leg of the slices that hold one of `layers`, on the fixture's `rows`, a chunk's first ones.

    Each is fed with what the slice before gave, in the strict engine's `capture` of the whole.
    """
    fixture, found = work.inputs.fixture, list[KernelOutcome]()
    chunks = fixture.chunks()
    index = next(i for i, (start, _) in enumerate(fixture.chunk_bounds()) if start == rows.start)
    for part in sliced.holding(layers):
        with sliced.file(part, chunks) as (path, local), open_gguf(path) as model:
            tokens = [int(token) for token in local[index][: rows.stop - rows.start]]
            recording = SliceRecording(
                model,
                tokens,
                settings,
                n_batch=len(tokens),
                n_single=0,
                overrides=tuple(overrides_for(part, sliced.artifact.arch, work.request.overrides)),
                states=sliced.states_before(part, capture),
                first_row=rows.start,
                first_layer=part.first,
            )
            found.append(replay_leg(recording, work.request.tolerances, work.request.say))
    return _together(found)


@dataclass(frozen=True)
class SliceRecording(Recording):
    """Of a slice whose first layer is `first_layer` of the whole; nodes and weights have the whole's names."""

    first_layer: int = 0

    def replayed(self, only: Sequence[str] = (), evaluations: Sequence[Evaluation] | None = None) -> Outcome:
        """Raises EngineCrash, FixtureError."""
        outcome = super().replayed([_moved(name, -self.first_layer) for name in only], evaluations)
        by = self.first_layer
        outcome.replayed = [
            replace(each, node=_renamed(each.node, by), weight=each.weight and _moved(each.weight, by))
            for each in outcome.replayed
        ]
        return outcome


def _renamed(node: RecordedNode, by: int) -> RecordedNode:
    sources = tuple(None if each is None else _value(each, by) for each in node.sources)
    return replace(node, name=_moved(node.name, by), out=_value(node.out, by), sources=sources)


def _value(value: Value, by: int) -> Value:
    return replace(value, name=_moved(value.name, by))


def _moved(name: str, by: int) -> str:
    """A tensor's or node's name with its layer's number `by` higher: `blk.0.attn_q.weight`, `Qcur-0`, `cache_k_l0`."""
    return _NUMBER.sub(lambda found: f"{found['before']}{int(found['layer']) + by}", name, count=1)


def _together(found: Sequence[KernelOutcome]) -> KernelOutcome:
    """One outcome: the first slice's that accuses a node, with the failing nodes of all."""
    accusing = [each for each in found if each.first is not None]
    if not accusing:
        return found[0]
    first = accusing[0]
    failing = [row for each in accusing for row in each.leg.failing]
    layers = frozenset(layer for each in accusing for layer in each.layers)
    return replace(first, leg=first.leg.model_copy(update={"failing": failing}), layers=layers)
