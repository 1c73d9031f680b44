"""`restore`: parts of the checkpoint put back into the artifact, and parts of the artifact put into the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffharness.engine.quantizer import Quantizer
from diffharness.errors import CheckpointError, EngineError, OutputError
from diffharness.forensics import groups as grouping
from diffharness.forensics.control import Control
from diffharness.forensics.drift import Drift, tensor_errors
from diffharness.forensics.groups import Group, joined
from diffharness.forensics.lineage import is_rounded_otherwise
from diffharness.forensics.metadata import differences
from diffharness.forensics.restoration import Evidence, conclude
from diffharness.forensics.restore import Rung, is_spread, is_too_short, lost_more
from diffharness.paired import paired
from diffharness.pipeline.exchanging import exchange_of
from diffharness.pipeline.folder import run_folder
from diffharness.pipeline.inputs import Inputs, open_inputs
from diffharness.pipeline.reference_runs import Precision
from diffharness.pipeline.request import Say
from diffharness.pipeline.restore_search import Task, score, search
from diffharness.pipeline.subjects import artifact_subject, checkpoint_subject, fixture_subject, machine_subject
from diffharness.pipeline.timing import Timings
from diffharness.records import MetadataRow, Subject
from diffharness.records.restore import GroupScore, LineageMarks, RestoreRecord, Side
from diffharness.reference import archs
from diffharness.settings import EngineSettings, Tolerances
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.source import WeightSource

By = Literal["class", "layer", "block"]
Into = Literal["artifact", "checkpoint", "both"]

_BLOCKS = 6  # blocks of layers that `--by block` makes


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


@dataclass(frozen=True)
class _Compared:
    """What is known before any forward."""

    kinds: list[str]
    metadata: list[MetadataRow]
    groups: list[Group]
    drift: Drift
    control: WeightSource | None

    @property
    def drifted(self) -> frozenset[str]:
        return frozenset(t.name for t in self.drift.tensors if t.damaged) | frozenset(self.drift.missing)


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
            with timings.step("tensors"):
                compared = _compare(request, inputs, inputs.checkpoint, control)
            with timings.step("forwards"):
                record = _restored(request, inputs, inputs.checkpoint, compared, folder)
    record.timings = timings.seconds
    return record


def _compare(request: RestoreRequest, inputs: Inputs, checkpoint: Checkpoint, control: Control) -> _Compared:
    artifact = inputs.artifact
    model = archs.build(artifact.metadata)
    kinds = [model.layer_kind(il) for il in range(model.n_layer)]
    longest = max(map(len, inputs.fixture.chunks()))
    metadata = differences(artifact.metadata, checkpoint.metadata, artifact.arch, n_tokens=longest)
    names = [*artifact.tensors, *(name for name in checkpoint.tensors if name not in artifact.tensors)]
    groups = _groups(request, names, len(kinds), [row.key for row in metadata if row.used])
    request.say("comparing tensors with the checkpoint's")
    try:
        drift = tensor_errors(artifact, checkpoint, control, request.tolerances)
    except (EngineError, OutputError) as error:
        request.say(f"no control: {error.message}")
        drift = tensor_errors(artifact, checkpoint, None, request.tolerances)
        return _Compared(kinds, metadata, groups, drift, None)
    return _Compared(kinds, metadata, groups, drift, control)


def _groups(request: RestoreRequest, names: Sequence[str], n_layer: int, keys: Sequence[str]) -> list[Group]:
    """The groups that were asked for; by class, and used keys each by itself, if nothing was."""
    picked = [grouping.by_layers(names, text, n_layer) for text in request.layers]
    picked += [grouping.by_glob(names, pattern) for pattern in request.tensors]
    if picked and request.by is None:
        return picked
    within = joined(picked).tensors if picked else frozenset(names)
    own = [] if picked else grouping.of_keys(keys)
    match request.by:
        case "layer":
            return [*own, *grouping.by_layer(within)]
        case "block":
            return [*own, *grouping.by_block(within, math.ceil(n_layer / _BLOCKS))]
        case _:
            return [*own, *grouping.by_class(within)]


def _restored(
    request: RestoreRequest, inputs: Inputs, checkpoint: Checkpoint, compared: _Compared, folder: Path
) -> RestoreRecord:
    fixture, floors, drift = inputs.fixture, request.tolerances, compared.drift
    chunk_of = fixture.scored_positions() // fixture.chunk
    exchange = exchange_of(
        inputs.artifact,
        checkpoint,
        drift,
        compared.metadata,
        fixture,
        Precision(request.dtype, request.device),
        folder,
        floors,
        request.say,
        planned=3 + (0 if request.search else len(compared.groups)),
        reuse=request.reuse,
    )
    control = exchange.control(compared.control)
    loses_more = control is not None and lost_more(exchange.artifact, control, floors)
    evidence = Evidence(
        kinds=compared.kinds,
        drift=drift,
        metadata=compared.metadata,
        artifact=exchange.artifact,
        checkpoint=exchange.checkpoint,
        control=control,
        too_short=is_too_short(paired(exchange.artifact.nll, exchange.checkpoint.nll, chunk_of)),
        lost_more=loses_more,
        rounded_otherwise=control is not None and not loses_more and is_rounded_otherwise(drift.tensors, floors),
    )
    evidence.ladders = {side: exchange.ladder(compared.groups, side) for side in _sides(request, evidence)}
    if evidence.is_suspect and math.isfinite(exchange.artifact.kl_mean):
        evidence.spread = is_spread(drift, floors, logits_moved=evidence.lost_more)
    if evidence.spread:
        evidence.lineage = exchange.lineage(control)
    if request.search:
        narrowed = request.by or request.layers or request.tensors
        keys = [row.key for row in compared.metadata if row.used]
        groups = compared.groups if narrowed else None
        task = Task(compared.kinds, keys, groups, request.within, request.budget)
        evidence.search = search(exchange, drift, control, task)
    verdict, findings = conclude(evidence, floors, str(request.model), str(request.checkpoint))
    scores = {"artifact": exchange.artifact, "checkpoint": exchange.checkpoint}
    scores |= {"control": control} if control is not None else {}
    return RestoreRecord(
        verdict=verdict,
        subject=Subject(
            artifact=artifact_subject(request.model, inputs.artifact),
            checkpoint=checkpoint_subject(request.checkpoint, checkpoint),
            fixture=fixture_subject(fixture),
            machine=machine_subject(),
        ),
        scores={name: score(outcome) for name, outcome in scores.items()},
        groups=[_row(rung, side, compared) for side, rungs in evidence.ladders.items() for rung in rungs],
        search=evidence.search,
        lineage=LineageMarks(
            spread=evidence.spread,
            mark=evidence.lineage.mark if evidence.lineage else None,
            additivity=evidence.lineage.additivity if evidence.lineage else None,
        ),
        layer_kinds=compared.kinds,
        metadata=compared.metadata,
        findings=findings,
        forwards=exchange.mixtures.count.forwards,
        layers_run=exchange.mixtures.count.layers,
        repro=request.repro,
    )


def _sides(request: RestoreRequest, evidence: Evidence) -> list[Side]:
    """The ladders to be made: what was asked for, and both where the tensors or logits are beyond their types' loss."""
    if request.search:
        return []
    if request.into == "both" or evidence.is_suspect:
        return ["artifact", "checkpoint"]
    return [request.into]


def _row(rung: Rung, side: Side, compared: _Compared) -> GroupScore:
    return GroupScore(
        **score(rung.outcome).model_dump(),
        into=side,
        group=rung.group.label,
        tensors=sorted(rung.group.tensors),
        keys=sorted(rung.group.keys),
        drifted=len(rung.group.tensors & compared.drifted),
        change=rung.change.mean,
        error=rung.change.error,
        told=rung.told,
    )
