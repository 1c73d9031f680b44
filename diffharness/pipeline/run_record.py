"""The record of a run: what its legs came to, with the verdict, the scores and the subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffharness import verdict
from diffharness.fixture import Fixture
from diffharness.legs.settings import SettingsOutcome
from diffharness.metrics import mean_nll, nll_per_position, perplexity
from diffharness.pipeline.artifact_side import ArtifactSide
from diffharness.pipeline.engine_runs import EngineRuns
from diffharness.pipeline.kernel_side import KernelSide
from diffharness.pipeline.reference_runs import GraphRuns, Logits
from diffharness.pipeline.subjects import (
    artifact_subject,
    checkpoint_subject,
    engine_subject,
    fixture_subject,
    machine_subject,
)
from diffharness.pipeline.work import Work
from diffharness.records import EngineRow, Finding, Legs, RunRecord, Score, Scores, Subject


@dataclass(frozen=True)
class Sides:
    """What the engine gave, and what each leg made of it; the graph leg is the kernel side's, as that leaves it."""

    engine: EngineRuns
    kernel: KernelSide
    settings: SettingsOutcome
    artifact: ArtifactSide
    graph_runs: GraphRuns | None = None  # None where the reference did not run beside the engine


def record_of(work: Work, sides: Sides, findings: Sequence[Finding], engines: Sequence[EngineRow] = ()) -> RunRecord:
    """The record; `findings` are all of them, and the verdict is made of these and of the legs."""
    request, graph = work.request, sides.kernel.graph
    legs = Legs(
        tokens=work.inputs.tokens.leg,
        graph=graph.leg,
        kernel=sides.kernel.kernel.leg,
        settings=sides.settings.leg,
        artifact=sides.artifact.outcome.leg,
    )
    in_order = (graph, sides.kernel, sides.settings, sides.artifact.outcome)
    return RunRecord(
        verdict=verdict.decide(findings, legs, model=str(request.model)),
        first_divergence=next((side.first_divergence for side in in_order if side.first_divergence), None),
        legs=legs,
        scores=_scores(work.inputs.fixture, sides),
        findings=list(findings),
        engines=list(engines),
        subject=_subject(work, sides.engine),
        repro=request.repro,
    )


def _scores(fixture: Fixture, sides: Sides) -> Scores:
    by_reference: dict[str, Logits] = {}
    if sides.graph_runs is not None:
        by_reference["artifact"] = sides.graph_runs.logits
        if sides.graph_runs.convention_logits is not None:
            by_reference["artifact, ggml's conventions"] = sides.graph_runs.convention_logits
    by_reference |= sides.artifact.logits
    return Scores(
        reference={name: _score(logits, fixture) for name, logits in by_reference.items()},
        engine={name: _score(run.open().read("logits"), fixture) for name, run in sides.engine.named.items()},
    )


def _score(logits: Logits, fixture: Fixture) -> Score:
    nll = nll_per_position(logits[fixture.scored_positions()], fixture.next_ids())
    return Score(ppl=perplexity(nll), nll=mean_nll(nll), n=len(nll))


def _subject(work: Work, engine: EngineRuns) -> Subject:
    request, inputs = work.request, work.inputs
    checkpoint, ran = inputs.checkpoint, engine.native or engine.strict
    return Subject(
        artifact=artifact_subject(request.model, inputs.artifact),
        checkpoint=checkpoint_subject(request.checkpoint, checkpoint) if request.checkpoint and checkpoint else None,
        fixture=fixture_subject(inputs.fixture),
        engine=engine_subject(ran.settings if ran else request.engine, ran.info if ran else {}, request.overrides),
        machine=machine_subject(),
    )
