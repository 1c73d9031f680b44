"""`run`: every leg that the inputs allow, one after another, and the record of it all."""

from __future__ import annotations

from collections.abc import Collection

from diffharness.engine.runner import EngineCrash, check_overrides
from diffharness.engine.strict import rope_parameters
from diffharness.errors import ArtifactFileError, InconclusiveError, UnsupportedError
from diffharness.forensics.findings import non_finite_finding
from diffharness.legs import graph as graph_leg
from diffharness.legs.graph import GraphOutcome
from diffharness.pipeline import (
    artifact_side,
    early,
    engine_runs,
    engines_ab,
    explaining,
    kernel_side,
    noise,
    overrides,
    reference_runs,
    settings_side,
    strict_way,
)
from diffharness.pipeline.artifact_side import ArtifactSide
from diffharness.pipeline.engine_runs import EngineRuns
from diffharness.pipeline.folder import run_folder
from diffharness.pipeline.grids import load_grid
from diffharness.pipeline.inputs import open_inputs
from diffharness.pipeline.kernel_side import KernelSide
from diffharness.pipeline.reference_runs import GraphRuns, Logits, Precision
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.run_record import Sides, record_of
from diffharness.pipeline.timing import Timings
from diffharness.pipeline.unknown_keys import unknown_keys
from diffharness.pipeline.work import Work
from diffharness.records import Finding, GraphLeg, RunRecord
from diffharness.reference.runner import Reference
from diffharness.weights.check import non_finite

_NO_CHECKPOINT = "there is no checkpoint to compare with: give it with --checkpoint"


def run(request: RunRequest) -> RunRecord:
    """The whole differential run.

    Raises BadInputError for unfit inputs. What ends a run early and is a verdict comes back as a record: an
    artifact that is no readable GGUF, an engine that dies over the text, nothing that could be compared.
    With `request.out` the run folder keeps the captures.
    """
    check_overrides(request.overrides)
    if request.grid is not None:
        load_grid(request.grid)  # a name that is none ends the run before the engine has run
    timings = Timings()
    with timings.step("total"):
        record = _ended(request, timings)
    record.timings = timings.seconds
    return record


def _ended(request: RunRequest, timings: Timings) -> RunRecord:
    try:
        with timings.step("open"):
            inputs = open_inputs(
                request.model,
                request.checkpoint,
                request.fixture,
                request.n_tokens,
                request.engine,
                need_reference=False,
            )
        before = inputs.stamps()
        with run_folder(request.out) as folder:
            work = Work(request, inputs, folder, timings)
            record = _run(work) if inputs.gap is None else _without_reference(work, inputs.gap)
        if inputs.stamps() != before:
            raise InconclusiveError(
                f"{inputs.artifact.label} or its checkpoint changed while they were being run",
                hint="the legs saw different files; wait until nothing writes to them, and run again",
            )
        return record
    except UnsupportedError:
        raise
    except ArtifactFileError as error:
        return early.no_model(request, error)
    except EngineCrash as crash:
        return early.no_tokens(request, crash)
    except InconclusiveError as error:
        return early.nothing_compared(request, error)


def _run(work: Work) -> RunRecord:
    request, inputs = work.request, work.inputs
    precision = Precision(request.dtype, request.device)
    # refuses a device that is not there before the engine has worked for it
    Reference(inputs.artifact, dtype=request.dtype, device=request.device)
    findings, broken = _before_the_legs(work)

    with strict_way.strict_model(work) as chosen:
        engine = engine_runs.run_all(work, chosen)
        with work.timings.step("reference: graph"):
            graph_runs = _graph_runs(work, engine, precision)
        graph = _graph(work, graph_runs, engine)
        if graph.leg.status == "fail":
            engine_runs.confirm(engine, work, chosen, kernel_side.failing_layers(graph))
        kernel = kernel_side.run_all(work, engine, graph, chosen)
        engines, of_engines = engines_ab.ab_rows(work, engine, graph_runs, chosen)
    findings += engine.findings
    findings += [_under_settings(f, request) for f in _explained(work, engine, kernel, graph_runs, precision)]
    findings += kernel.kernel.findings
    settings = settings_side.run_all(work, engine)
    findings += settings.findings
    if request.noise:
        told = noise.judge_noise(
            work, engine, graph_runs, precision, graph=kernel.graph.leg.status, kernel=kernel.kernel.leg.status
        )
        kernel.kernel.leg.noise = told.report
        findings += told.findings
    findings += of_engines

    artifact = _artifact(work, precision, None if graph_runs is None else graph_runs.logits)
    findings += _unheard_of(artifact, broken)
    return record_of(work, Sides(engine, kernel, settings, artifact, graph_runs), findings, engines)


def _without_reference(work: Work, gap: str) -> RunRecord:
    """Everything that needs no forward of our own: native engine, kernels, settings, tensors and keys.

    Without the graph leg nothing is said to agree.
    """
    work.request.say(f"there is no reference for this file: {gap}")
    findings, broken = _before_the_legs(work)
    engine = engine_runs.run_native(work, EngineRuns())
    graph = GraphOutcome(GraphLeg(reason=gap), None, [])
    kernel = kernel_side.run_native(work, engine, graph)
    settings = settings_side.run_all(work, engine)
    artifact = _artifact_without_forward(work)
    findings += [_no_reference(gap), *engine.findings, *kernel.kernel.findings, *settings.findings]
    findings += _unheard_of(artifact, broken)
    return record_of(work, Sides(engine, kernel, settings, artifact), findings)


def _unheard_of(artifact: ArtifactSide, broken: Collection[str]) -> list[Finding]:
    """The artifact leg's findings, without those on tensors that the scan has told of already."""
    return [f for f in artifact.outcome.findings if not (broken and f.kind == "artifact.file")]


def _no_reference(gap: str) -> Finding:
    message = f"the reference cannot compute this file, so that the engine's graph was not compared: {gap}"
    return Finding(kind="inconclusive", leg="graph", message=message, next_step="diffharness archs")


def _before_the_legs(work: Work) -> tuple[list[Finding], dict[str, int]]:
    """Findings on tokens, overrides and values that are not finite; and how many of these, by tensor."""
    inputs, request = work.inputs, work.request
    findings = [*inputs.tokens.findings, *overrides.check_for(request.overrides, inputs.artifact, request.engine)]
    with work.timings.step("scan"):
        request.say(f"reading {inputs.artifact.label} for values that are not finite")
        broken = {found.tensor: found.count for found in non_finite(inputs.artifact)}
    return [*findings, *([non_finite_finding(broken)] if broken else [])], broken


# -- legs ---------------------------------------------------------------------------------------------


def _explained(
    work: Work, engine: EngineRuns, kernel: KernelSide, runs: GraphRuns | None, precision: Precision
) -> list[Finding]:
    """The graph leg's findings, with what would make the reference reproduce the engine where the graph is accused."""
    findings = kernel.graph.findings
    accused = any(finding.kind == "engine.graph" for finding in findings)
    if not accused or not work.request.explain or runs is None or engine.strict is None:
        return findings
    work.request.say("searching for what would reproduce the engine")
    with work.timings.step("explain"):
        try:
            explanation = explaining.of_runs(
                work.inputs.artifact,
                engine.strict.open(),
                work.inputs.fixture,
                runs,
                work.floors,
                precision=precision,
                n_ubatch=engine.strict.settings.n_ubatch,
            )
        except InconclusiveError as error:  # what is not explained is accused all the same
            work.request.say(f"not explained: {error.message}")
            return findings
    if explanation is None:
        return findings
    step = explaining.further(work.request, explanation, "run")
    return [explaining.told(f, explanation, step) if f.kind == "engine.graph" else f for f in findings]


def _under_settings(finding: Finding, request: RunRequest) -> Finding:
    """An engine that was told other hyperparameters is not accused without saying so."""
    told = [*request.overrides, *(f"{name} {value:g}" for name, value in rope_parameters(request.engine).items())]
    if finding.kind != "engine.graph" or not told:
        return finding
    return finding.model_copy(update={"message": f"{finding.message}; under {', '.join(told)}"})


def _graph_runs(work: Work, engine: EngineRuns, precision: Precision) -> GraphRuns | None:
    if engine.strict is None:
        return None
    work.request.say("reference on the artifact, layer by layer on its own and on the engine's inputs")
    return reference_runs.against_engine(
        work.inputs.artifact,
        engine.strict.open(),
        work.inputs.fixture,
        work.floors,
        precision=precision,
        n_ubatch=engine.strict.settings.n_ubatch,
    )


def _graph(work: Work, runs: GraphRuns | None, engine: EngineRuns) -> GraphOutcome:
    if runs is None or engine.strict is None:
        return GraphOutcome(GraphLeg(reason=engine.reason or "the strict engine did not run"), None, [])
    judged = graph_leg.judge(
        runs.definition,
        runs.conventions,
        engine_taps=engine.strict.taps,
        reference_taps=runs.taps,
        unread=runs.unread,
        unknown_keys=unknown_keys(work.inputs.artifact, engine.strict),
    )
    judged.leg.strict = engine.way
    return judged


def _artifact_without_forward(work: Work) -> ArtifactSide:
    if work.inputs.checkpoint is not None:
        return artifact_side.without_forward(work, work.inputs.checkpoint)
    if work.request.checkpoint is not None:
        return artifact_side.not_run(f"there are no names that {work.inputs.artifact.arch} checkpoints are read by")
    return artifact_side.not_run(_NO_CHECKPOINT)


def _artifact(work: Work, precision: Precision, artifact_logits: Logits | None) -> ArtifactSide:
    if work.inputs.checkpoint is None:
        return artifact_side.not_run(_NO_CHECKPOINT)
    return artifact_side.run_all(work, work.inputs.checkpoint, precision, artifact_logits)
