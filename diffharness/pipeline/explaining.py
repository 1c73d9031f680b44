"""`explain`: the strict engine, the graph leg, and the search for what would make the reference reproduce it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from diffharness import verdict
from diffharness.captures import Capture
from diffharness.engine.runner import EngineRun, check_overrides
from diffharness.errors import InconclusiveError
from diffharness.fixture import Fixture
from diffharness.legs import graph as graph_leg
from diffharness.legs.explain import Budget, LocalTrials, search
from diffharness.legs.graph import GraphOutcome, PassResult
from diffharness.pipeline import engine_runs, overrides, reference_runs, strict_way
from diffharness.pipeline.folder import run_folder
from diffharness.pipeline.inputs import open_inputs
from diffharness.pipeline.reference_runs import GraphRuns, Precision
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.subjects import artifact_subject, engine_subject, fixture_subject, machine_subject
from diffharness.pipeline.timing import Timings
from diffharness.pipeline.unknown_keys import unknown_keys
from diffharness.pipeline.work import Work
from diffharness.records import Finding, GraphLeg, Legs, Subject
from diffharness.records.explain import ExplainRecord, Explanation
from diffharness.reference.hypotheses import Place
from diffharness.reference.local import Chunk, LocalForward
from diffharness.reference.model import DEFINITION, Arithmetic
from diffharness.reference.runner import Reference
from diffharness.reference.steps import Steps
from diffharness.weights.source import WeightSource

BUDGET = 600  # evaluations of one layer; a whole pass counts as many as the model has layers, and two
_TOKENS = 256  # on which hypotheses are tried, unless the first that fails comes later in its chunk
_BEYOND = 64  # tokens tried after the first failing one of a long chunk
_LOGITS_BYTES = 64 << 20  # of one side's logits, where the head is tried


def explain_divergence(
    source: WeightSource,
    strict: Capture,
    fixture: Fixture,
    failing: PassResult,
    floors: Mapping[str, float],
    *,
    precision: Precision,
    n_ubatch: int,
    arithmetic: Arithmetic = DEFINITION,
    budget: int = BUDGET,
) -> Explanation:
    """Search the hypotheses that make the reference reproduce `strict`.

    `failing` is the pass of the reference that failed, `arithmetic` what it was made with. At most `budget`
    evaluations of a layer are made. Raises InconclusiveError where nothing fails.
    """
    if not failing.failing:
        raise InconclusiveError("nothing to explain: no tap leaves its floor")
    model = Reference(source).model
    inputs = reference_runs.layer_inputs(strict)
    forward = LocalForward(source, inputs, dtype=precision.dtype, device=precision.device, arithmetic=arithmetic)
    trials = LocalTrials(
        forward=forward,
        engine=strict,
        metadata=source.metadata,
        kinds=[model.layer_kind(il) for il in range(model.n_layer)],
        floors=floors,
        arithmetic=arithmetic.conventions,
        choice=reference_runs.choice_of(source),
        budget=Budget(max(budget, 2 * (model.n_layer + 2) + 1)),
    )

    def whole(changed: Steps) -> PassResult:
        passed = reference_runs.graph_pass(
            source, strict, fixture, floors,
            precision=precision, n_ubatch=n_ubatch, arithmetic=arithmetic, model=changed,
        )  # fmt: skip
        return passed.result

    width = forward.weights.n_rows("token_embd.weight")
    try:
        return search(trials, model, failing, whole, lambda place, row: chunks_at(fixture, place, row, width))
    finally:
        forward.close()


def chunks_at(fixture: Fixture, place: Place, row: int | None, n_vocab: int) -> list[Chunk]:
    """The chunk that row is of, and following ones, as far as hypotheses are tried on them.

    A long chunk is cut behind the row; the head, which sees each token by itself, gets a few around it.
    """
    ids = list(fixture.chunks())
    bounds = list(fixture.chunk_bounds())
    row = row or 0
    index = next(i for i, (_, end) in enumerate(bounds) if row < end)
    if place == "head":
        n_rows = max(8, _LOGITS_BYTES // (4 * n_vocab))
        start, end = bounds[index]
        first = max(start, min(row - n_rows // 8, end - n_rows))
        last = min(end, first + n_rows)
        return [Chunk(ids[index][first - start : last - start], slice(first, last))]
    found: list[Chunk] = []
    for (start, _), chunk in zip(bounds[index:], ids[index:], strict=True):
        length = min(len(chunk), _TOKENS if found else max(_TOKENS, row - start + _BEYOND))
        if found and sum(len(one.ids) for one in found) + length > _TOKENS:
            break
        found.append(Chunk(chunk[:length], slice(start, start + length)))
    return found


def told(finding: Finding, explanation: Explanation, next_step: str | None = None) -> Finding:
    """The graph leg's finding, with what explains it; with the command that would tell more where nothing does."""
    evidence = {**finding.evidence, "explanation": explanation.model_dump(mode="json")}
    message = f"{finding.message}; {explanation.answer}" if explanation.answer else finding.message
    step = finding.next_step if explanation.found else next_step
    return finding.model_copy(update={"message": message, "evidence": evidence, "next_step": step})


def further(request: RunRequest, explanation: Explanation, command: Literal["run", "explain"]) -> str:
    """The command that tells more of what nothing explains.

    The same search with a larger bound where that ended it; else after `run` all that is known, and then the nodes.
    """
    words = ["diffharness", "explain", str(request.model)]
    if explanation.exhausted:
        words += ["--budget", str(4 * explanation.budget)]
    elif command == "explain":
        words[1] = "replay"
    words += ["--fixture", str(request.fixture)] if request.fixture is not None else []
    words += ["--tokens", str(request.n_tokens)] if request.n_tokens is not None and words[1] == "explain" else []
    return shlex.join([*words, *(word for each in request.overrides for word in ("--override-kv", each))])


# -- the command --------------------------------------------------------------------------------------


def explain(request: RunRequest, *, budget: int = BUDGET) -> ExplainRecord:
    """The graph leg alone, and what explains it where it fails.

    Raises BadInputError for unfit inputs, EngineCrash where the engine dies over the fixture's text.
    """
    check_overrides(request.overrides)
    timings = Timings()
    with timings.step("total"):
        with timings.step("open"):
            inputs = open_inputs(request.model, None, request.fixture, request.n_tokens, request.engine)
        with run_folder(request.out) as folder:
            record = _explained(Work(request, inputs, folder, timings), budget)
    record.timings = timings.seconds
    return record


def _explained(work: Work, budget: int) -> ExplainRecord:
    request, inputs = work.request, work.inputs
    Reference(inputs.artifact, dtype=request.dtype, device=request.device)  # refuses a device that is not there
    notes = overrides.check_for(request.overrides, inputs.artifact, request.engine)
    with strict_way.strict_model(work) as chosen:
        engine = engine_runs.run_strict(work, chosen)
    findings = [*engine.findings, *notes]
    explanation: Explanation | None = None
    if engine.strict is None:
        outcome = GraphOutcome(GraphLeg(reason=engine.reason or "the strict engine did not run"), None, [])
    else:
        outcome, explanation = _graph(work, engine.strict, budget)
        outcome.leg.strict = engine.way
    findings += outcome.findings
    run = engine.strict
    return ExplainRecord(
        verdict=verdict.decide(findings, Legs(graph=outcome.leg), model=str(request.model), needs={"graph"}),
        first_divergence=outcome.first_divergence,
        explanation=explanation,
        graph=outcome.leg,
        findings=findings,
        subject=Subject(
            artifact=artifact_subject(request.model, inputs.artifact),
            fixture=fixture_subject(inputs.fixture),
            engine=engine_subject(run.settings if run else request.engine, run.info if run else {}, request.overrides),
            machine=machine_subject(),
        ),
        repro=request.repro,
    )


def _graph(work: Work, run: EngineRun, budget: int) -> tuple[GraphOutcome, Explanation | None]:
    """The graph leg of a strict run; where it fails, its findings and explanation."""
    artifact, fixture, say = work.inputs.artifact, work.inputs.fixture, work.request.say
    precision = Precision(work.request.dtype, work.request.device)
    strict, n_ubatch = run.open(), run.settings.n_ubatch
    with work.timings.step("reference: graph"):
        say("reference on the artifact, layer by layer on its own and on the engine's inputs")
        runs = reference_runs.against_engine(
            artifact, strict, fixture, work.floors, precision=precision, n_ubatch=n_ubatch
        )
    outcome = graph_leg.judge(
        runs.definition,
        runs.conventions,
        engine_taps=run.taps,
        reference_taps=runs.taps,
        unread=runs.unread,
        unknown_keys=unknown_keys(artifact, run),
    )
    if outcome.leg.status != "fail":
        return outcome, None
    with work.timings.step("explain"):
        say("searching for what would reproduce the engine")
        explanation = of_runs(
            artifact, strict, fixture, runs, work.floors, precision=precision, n_ubatch=n_ubatch, budget=budget
        )
    if explanation is None:
        return outcome, None
    step = further(work.request, explanation, "explain")
    findings = [told(f, explanation, step) if f.kind == "engine.graph" else f for f in outcome.findings]
    return replace(outcome, findings=findings), explanation


def of_runs(
    source: WeightSource,
    strict: Capture,
    fixture: Fixture,
    runs: GraphRuns,
    floors: Mapping[str, float],
    *,
    precision: Precision,
    n_ubatch: int,
    budget: int = BUDGET,
) -> Explanation | None:
    """Explain the graph leg's passes: the one that is nearer, as defined or with ggml's conventions.

    None if no tap fails in it.
    """
    failing, arithmetic = runs.definition, DEFINITION
    if runs.conventions is not None and len(runs.conventions.failing) <= len(failing.failing):
        failing, arithmetic = runs.conventions, reference_runs.conventions_of(source)
    if not failing.failing:
        return None
    return explain_divergence(
        source, strict, fixture, failing, floors,
        precision=precision, n_ubatch=n_ubatch, arithmetic=arithmetic, budget=budget,
    )  # fmt: skip
