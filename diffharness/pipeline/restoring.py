"""`restore`: parts of the checkpoint put back into the artifact, and parts of the artifact put into the checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffharness.engine.quantizer import Quantizer
from diffharness.errors import CheckpointError, EngineError, OutputError
from diffharness.fixture import Fixture
from diffharness.forensics import groups as grouping
from diffharness.forensics import restore as exchange
from diffharness.forensics.control import Control
from diffharness.forensics.delta import Smallest, smallest
from diffharness.forensics.drift import Drift, tensor_errors
from diffharness.forensics.groups import Group, joined
from diffharness.forensics.lineage import differs_everywhere
from diffharness.forensics.metadata import differences
from diffharness.forensics.restoration import Evidence, conclude
from diffharness.forensics.restore import Lineage, Outcome, Rung, is_other_lineage, ladder, lost_more
from diffharness.pipeline.folder import run_folder
from diffharness.pipeline.inputs import Inputs, open_inputs
from diffharness.pipeline.mixtures import Blend, Mixtures
from diffharness.pipeline.reference_runs import Precision
from diffharness.pipeline.request import Say
from diffharness.pipeline.subjects import artifact_subject, checkpoint_subject, fixture_subject, machine_subject
from diffharness.pipeline.timing import Timings
from diffharness.records import MetadataRow, Subject
from diffharness.records.restore import GroupScore, LineageMarks, MixtureScore, RestoreRecord, SearchResult, Side
from diffharness.reference import archs
from diffharness.settings import EngineSettings, Tolerances
from diffharness.weights.checkpoint import Checkpoint

By = Literal["class", "layer", "block"]
Into = Literal["artifact", "checkpoint", "both"]

_BLOCKS = 6  # blocks of layers that `--by block` makes
_SAY_EVERY = 1.0  # seconds between lines of progress


@dataclass(frozen=True)
class RestoreRequest:
    """One restoration. `layers` and `tensors` are groups of their own, or with `by` what groups are made of."""

    model: Path
    checkpoint: Path
    engine: EngineSettings
    tolerances: Tolerances
    fixture: str | None = None
    n_tokens: int | None = None
    by: By | None = None
    layers: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    into: Into = "artifact"
    search: bool = False
    within: float = 0.01
    budget: int = 60
    device: str = "cpu"
    dtype: str = "float32"
    reuse: bool = True  # start forwards at the first layer that changed
    repro: str = ""
    say: Say = field(default=lambda text: None, repr=False)

    @property
    def floors(self) -> dict[str, float]:
        return {name: self.tolerances[name] for name in self.tolerances.floors}


def restore(request: RestoreRequest) -> RestoreRecord:
    """Exchange, score, conclude.

    Raises BadInputError for unfit inputs and for groups without tensors, EngineError where the engine dies over the
    fixture's text.
    """
    timings = Timings()
    with timings.step("total"):
        with timings.step("open"):
            inputs = open_inputs(request.model, request.checkpoint, request.fixture, request.n_tokens, request.engine)
        if inputs.checkpoint is None:
            raise CheckpointError("expected a checkpoint to restore from", hint="--checkpoint DIR")
        with run_folder(None) as folder, Quantizer(request.engine) as quantizer:
            control = Control(inputs.checkpoint, inputs.artifact, quantizer.quantize)
            record = _Restoration(request, inputs, inputs.checkpoint, control, folder, timings).record()
    record.timings = timings.seconds
    return record


class _Restoration:
    """The steps of one restoration, in order, and what each of them leaves for the next."""

    def __init__(
        self,
        request: RestoreRequest,
        inputs: Inputs,
        checkpoint: Checkpoint,
        control: Control,
        folder: Path,
        timings: Timings,
    ) -> None:
        self.request, self.inputs, self.checkpoint = request, inputs, checkpoint
        self.folder, self.timings, self.floors = folder, timings, request.floors
        self.fixture: Fixture = inputs.fixture
        self.chunk_of = self.fixture.scored_positions() // self.fixture.chunk
        self.precision = Precision(request.dtype, request.device)
        model = archs.build(inputs.artifact.metadata)
        self.kinds = [model.layer_kind(il) for il in range(model.n_layer)]
        self.meter = Meter(request.say)
        longest = max(map(len, self.fixture.chunks()))
        self.metadata: list[MetadataRow] = differences(
            inputs.artifact.metadata, checkpoint.metadata, inputs.artifact.arch, n_tokens=longest
        )
        names = [*inputs.artifact.tensors, *(n for n in checkpoint.tensors if n not in inputs.artifact.tensors)]
        self.groups = self._chosen(names)  # what cannot be found is said before anything is measured
        self.control_source: Control | None = control
        self.drift = self._drift()
        self.damaged = frozenset(t.name for t in self.drift.tensors if t.damaged) | frozenset(self.drift.missing)
        self.mixtures = self._mixtures()

    # -- what is exchanged -----------------------------------------------------------------------------

    def _chosen(self, names: Sequence[str]) -> list[Group]:
        """The groups that were asked for; by class if nothing was; used keys of the metadata each by itself."""
        request, n_layer = self.request, len(self.kinds)
        picked = [grouping.by_layers(names, text, n_layer) for text in request.layers]
        picked += [grouping.by_glob(names, pattern) for pattern in request.tensors]
        if picked and request.by is None:
            return picked
        within = joined(picked).tensors if picked else frozenset(names)
        keys = [] if picked else grouping.of_keys(row.key for row in self.metadata if row.used)
        if request.by == "layer":
            return [*keys, *grouping.by_layer(within)]
        if request.by == "block":
            return [*keys, *grouping.by_block(within, math.ceil(n_layer / _BLOCKS))]
        return [*keys, *grouping.by_class(within)]

    def _drift(self) -> Drift:
        self.request.say("comparing tensors with the checkpoint's")
        with self.timings.step("tensors"):
            try:
                return tensor_errors(self.inputs.artifact, self.checkpoint, self.control_source, self.floors)
            except (EngineError, OutputError) as error:
                self.request.say(f"no control: {error.message}")
                self.control_source = None
                return tensor_errors(self.inputs.artifact, self.checkpoint, None, self.floors)

    def _mixtures(self) -> Mixtures:
        self.meter.planned = 3 + len(self.groups)
        self.meter.doing = "the checkpoint"
        with self.timings.step("forwards"):
            return Mixtures(
                self.inputs.artifact,
                self.checkpoint,
                self.fixture,
                self.precision,
                self.folder,
                keys={row.key: row.checkpoint for row in self.metadata},
                equal=frozenset(t.name for t in self.drift.tensors if t.error == 0.0),
                told=self.meter.told,
                reuse=self.request.reuse,
            )

    # -- scores ----------------------------------------------------------------------------------------

    def record(self) -> RestoreRecord:
        request, mixtures = self.request, self.mixtures
        with self.timings.step("forwards"):
            theirs = mixtures.of(mixtures.everything)
            self.meter.doing = "the artifact"
            artifact = mixtures.of(Group(""))
            control = self._control()
            evidence = Evidence(
                kinds=self.kinds,
                drift=self.drift,
                metadata=self.metadata,
                artifact=artifact,
                checkpoint=theirs,
                control=control,
                too_short=exchange.is_too_short(exchange.paired(artifact.nll, theirs.nll, self.chunk_of)),
                lost_more=control is not None and lost_more(artifact, control, self.floors),
            )
            everywhere = evidence.is_suspect and self._everywhere(evidence.lost_more)
            shown: list[Side] = []
            if not request.search:
                shown = ["artifact", "checkpoint"] if request.into == "both" or evidence.is_suspect else [request.into]
                shown = [*dict.fromkeys([*shown, *([request.into] if request.into != "both" else [])])]
            ladders = {side: self._ladder(self.groups, side, artifact, theirs) for side in shown}
            evidence.ladders = ladders
            if everywhere:
                evidence.lineage = self._lineage(artifact, theirs, control)
                evidence.everywhere = True
            found = self._search(artifact, theirs, control) if request.search else None
            evidence.search = found
        verdict, findings = conclude(evidence, str(request.model), str(request.checkpoint))
        scores = {"artifact": artifact, "checkpoint": theirs, **({"control": control} if control else {})}
        return RestoreRecord(
            verdict=verdict,
            subject=Subject(
                artifact=artifact_subject(request.model, self.inputs.artifact),
                checkpoint=checkpoint_subject(request.checkpoint, self.checkpoint),
                fixture=fixture_subject(self.fixture),
                machine=machine_subject(),
            ),
            scores={name: score(outcome) for name, outcome in scores.items()},
            groups=[self._row(rung, side) for side, rungs in ladders.items() for rung in rungs],
            search=found,
            lineage=LineageMarks(
                everywhere=evidence.everywhere,
                mark=evidence.lineage.mark if evidence.lineage else None,
                additivity=evidence.lineage.additivity if evidence.lineage else None,
            ),
            layer_kinds=self.kinds,
            metadata=self.metadata,
            findings=findings,
            forwards=mixtures.count.forwards,
            layers_run=mixtures.count.layers,
            repro=request.repro,
        )

    def _control(self) -> Outcome | None:
        if self.control_source is None:
            return None
        self.meter.doing = "the control: the checkpoint quantized afresh to the artifact's types"
        try:
            return self.mixtures.of_source(self.control_source)
        except (EngineError, OutputError) as error:
            self.request.say(f"no control: {error.message}")
            return None

    def _ladder(self, groups: Sequence[Group], side: Side, artifact: Outcome, theirs: Outcome) -> list[Rung]:
        mixtures, verb = self.mixtures, "restored" if side == "artifact" else "put into the checkpoint"
        self.meter.planned = max(self.meter.planned, mixtures.count.forwards + len(groups))

        def evaluate(exchanged: frozenset[Group]) -> Outcome:
            self.meter.doing = f"{', '.join(group.label for group in exchanged)} {verb}"
            one = joined(exchanged)
            return mixtures.of(one) if side == "artifact" else mixtures.without(one)

        base = artifact if side == "artifact" else theirs
        rungs = ladder(groups, evaluate, base, self.chunk_of, self.floors)
        return rungs if side == "artifact" else rungs[::-1]  # what matters most comes first

    # -- lineage ---------------------------------------------------------------------------------------

    def _everywhere(self, moved: bool) -> bool:
        rescaled = [t for t in self.drift.tensors if t.damaged and t.is_matrix and 1 - t.cos**2 <= t.limit]
        matrices = [t for t in self.drift.tensors if t.damaged and t.is_matrix]
        if matrices and 2 * len(rescaled) >= len(matrices):
            return False  # each times a constant: nobody trains that
        return differs_everywhere(self.drift.tensors, self.floors, logits_moved=moved)

    def _lineage(self, artifact: Outcome, theirs: Outcome, control: Outcome | None) -> Lineage:
        """By class in both directions, and where the differences are too large to add up, made small."""
        classes = grouping.by_class(self.mixtures.names)
        self.meter.planned = self.mixtures.count.forwards + 2 * len(classes)
        restored = self._ladder(classes, "artifact", artifact, theirs)
        harms = self._ladder(classes, "checkpoint", artifact, theirs)
        small = None
        if artifact.kl_mean > self.floors["restore.small_kl"] and math.isfinite(artifact.kl_mean):
            small = self._additivity_of_small(classes, theirs, artifact.kl_mean)
        return is_other_lineage(restored, harms, artifact, self.floors, everywhere=True, control=control, small=small)

    def _additivity_of_small(self, classes: Sequence[Group], theirs: Outcome, kl: float) -> float | None:
        """Of the same differences, each made small enough that KL goes with their square."""
        share = math.sqrt(self.floors["restore.small_kl"] / kl)
        self.request.say(f"the same with {share:.0%} of every difference, where independent ones add up")
        self.meter.planned = self.mixtures.count.forwards + len(classes) + 2
        small = self.mixtures.towards(Blend(self.mixtures.artifact, self.mixtures.checkpoint, share))
        whole = small.of(Group(""))

        def evaluate(exchanged: frozenset[Group]) -> Outcome:
            self.meter.doing = f"a little of {', '.join(group.label for group in exchanged)} put into the checkpoint"
            return small.without(joined(exchanged))

        return exchange.additivity(ladder(classes, evaluate, theirs, self.chunk_of, self.floors), whole, None)

    # -- search ----------------------------------------------------------------------------------------

    def _search(self, artifact: Outcome, theirs: Outcome, control: Outcome | None) -> SearchResult:
        request, mixtures, started = self.request, self.mixtures, self.mixtures.count.forwards
        target = control if control is not None and control.ppl > theirs.ppl else theirs
        limit = target.ppl * (1 + request.within)
        self.meter.planned = started + request.budget

        def enough(units: frozenset[Group]) -> bool | None:
            whole = joined(units)
            if mixtures.count.forwards - started >= request.budget and not mixtures.is_known(whole):
                return None
            self.meter.doing = f"{len(units)} groups restored"
            return mixtures.of(whole).ppl <= limit

        units = self._units(enough)
        reached = bool(enough(frozenset(units)))
        found: Smallest[Group] = Smallest(units, False, False, 0)
        if reached:
            found = smallest(units, enough, grouping.halves)
        best = joined(found.units)
        return SearchResult(
            target=target.ppl,
            target_of="checkpoint" if target is theirs else "control",
            within=request.within,
            reached=reached,
            words=grouping.in_words(found.units, self.kinds, mixtures.names),
            tensors=sorted(best.tensors),
            keys=sorted(best.keys),
            groups=[group.label for group in found.units],
            score=score(mixtures.of(best)) if mixtures.is_known(best) else None,
            minimal=found.minimal,
            finest=found.finest,
            forwards=mixtures.count.forwards - started,
            budget=request.budget,
        )

    def _units(self, enough: Callable[[frozenset[Group]], bool | None]) -> list[Group]:
        """Groups to search among: those with drifted tensors if they are enough together, else everything.

        The least drifted come first, to be left out first; keys come last.
        """
        names = self.mixtures.names - self.mixtures.equal
        weight = {t.name: t.excess * math.prod(t.shape) for t in self.drift.tensors}

        def units(tensors: frozenset[str]) -> list[Group]:
            found = grouping.limited(self.groups, tensors) if self._is_narrowed else grouping.by_class(tensors)
            return sorted(found, key=lambda group: sum(weight.get(name, 0.0) for name in group.tensors))

        keys = grouping.of_keys(row.key for row in self.metadata if row.used)
        drifted = [*units(names & self.damaged), *keys]
        if drifted and enough(frozenset(drifted)):
            return drifted
        return [*units(names), *keys]

    @property
    def _is_narrowed(self) -> bool:
        return bool(self.request.by or self.request.layers or self.request.tensors)

    def _row(self, rung: Rung, side: Side) -> GroupScore:
        return GroupScore(
            **score(rung.outcome).model_dump(),
            into=side,
            group=rung.group.label,
            tensors=sorted(rung.group.tensors),
            keys=sorted(rung.group.keys),
            drifted=len(rung.group.tensors & self.damaged),
            change=rung.change.mean,
            error=rung.change.error,
            told=rung.told,
        )


def score(outcome: Outcome) -> MixtureScore:
    """An outcome as the record has it."""
    return MixtureScore(
        ppl=outcome.ppl, nll=exchange.mean_nll(outcome.nll), n=len(outcome.nll), kl_mean=outcome.kl_mean
    )


class Meter:
    """Says which forward is on and about how long the rest will take; not more often than every second."""

    def __init__(self, say: Say) -> None:
        self._say, self._started, self._said = say, time.monotonic(), 0.0
        self.planned, self.doing = 0, ""

    def told(self, done: int) -> None:
        now = time.monotonic()
        if done == 0:
            self._started = now
        if done and now - self._said < _SAY_EVERY:
            return
        self._said = now
        left = (now - self._started) / done * max(1, self.planned - done) if done else None
        rest = "" if left is None else f", {_duration(left)} left"
        self._say(f"forward {done + 1} of {max(self.planned, done + 1)}{rest}: {self.doing}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
