"""`run`: every leg that the inputs allow, one after another, and the record of it all."""

from __future__ import annotations

from diffharness import verdict
from diffharness.engine.runner import EngineCrash, EngineRun, check_overrides
from diffharness.engine.strict import rope_parameters
from diffharness.errors import ArtifactFileError, InconclusiveError, UnsupportedError
from diffharness.fixture import Fixture
from diffharness.forensics.findings import non_finite_finding
from diffharness.legs import graph as graph_leg
from diffharness.legs import settings as settings_leg
from diffharness.legs.graph import GraphOutcome
from diffharness.legs.settings import SettingsOutcome
from diffharness.metrics import mean_nll, nll_per_position, perplexity
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
)
from diffharness.pipeline.artifact_side import ArtifactSide
from diffharness.pipeline.cell_runs import WHOLE, Strict
from diffharness.pipeline.engine_runs import EngineRuns
from diffharness.pipeline.folder import run_folder
from diffharness.pipeline.grid_run import run_grid
from diffharness.pipeline.grids import load_grid
from diffharness.pipeline.inputs import Inputs, open_inputs
from diffharness.pipeline.kernel_side import KernelSide
from diffharness.pipeline.reference_runs import GraphRuns, Logits, Precision
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.subjects import (
    artifact_subject,
    checkpoint_subject,
    engine_subject,
    fixture_subject,
    machine_subject,
)
from diffharness.pipeline.timing import Timings
from diffharness.pipeline.work import Work
from diffharness.records import (
    Finding,
    GraphLeg,
    Legs,
    RunRecord,
    Score,
    Scores,
    Subject,
)
from diffharness.reference.runner import Reference
from diffharness.weights.check import non_finite


def run(request: RunRequest) -> RunRecord:
    """The whole differential run.

    Raises BadInputError for unfit inputs. What ends a run early and is a verdict comes back as a record: an
    artifact that is no readable GGUF, an engine that dies over the text, nothing that could be compared.
    With `request.out` the run folder keeps the captures.
    """
    check_overrides(request.overrides)
    timings = Timings()
    with timings.step("total"):
        record = _ended(request, timings)
    record.timings = timings.seconds
    return record


def _ended(request: RunRequest, timings: Timings) -> RunRecord:
    try:
        with timings.step("open"):
            inputs = open_inputs(request.model, request.checkpoint, request.fixture, request.n_tokens, request.engine)
        before = _stamps(inputs)
        with run_folder(request.out) as folder:
            record = _run(Work(request, inputs, folder, timings))
        if _stamps(inputs) != before:
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
    findings: list[Finding] = [
        *inputs.tokens.findings,
        *overrides.check(request.overrides, inputs.artifact.kv_types),
    ]
    with work.timings.step("scan"):
        request.say(f"reading {inputs.artifact.label} for values that are not finite")
        broken = {found.tensor: found.count for found in non_finite(inputs.artifact)}
    if broken:
        findings.append(non_finite_finding(broken))

    with engine_runs.strict_file(work) as strict_path:
        engine = engine_runs.run_all(work, strict_path)
        with work.timings.step("reference: graph"):
            graph_runs = _graph_runs(work, engine, precision)
        graph = _graph(graph_runs, engine)
        if graph.leg.status == "fail":
            engine_runs.confirm(engine, work, strict_path)
        kernel = kernel_side.run_all(work, engine, graph, strict_path)
        engines, of_engines = engines_ab.ab_rows(work, engine, graph_runs, strict_path)
    findings += engine.findings
    findings += [_under_settings(f, request) for f in _explained(work, engine, kernel, graph_runs, precision)]
    findings += kernel.kernel.findings
    settings = _settings(work, engine)
    findings += settings.findings
    if request.noise:
        told = noise.judge_noise(
            work, engine, graph_runs, precision, graph=kernel.graph.leg.status, kernel=kernel.kernel.leg.status
        )
        kernel.kernel.leg.noise = told.report
        findings += told.findings
    findings += of_engines

    artifact = _artifact(work, precision, None if graph_runs is None else graph_runs.logits)
    findings += [f for f in artifact.outcome.findings if not (broken and f.kind == "artifact.file")]

    legs = Legs(
        tokens=inputs.tokens.leg,
        graph=kernel.graph.leg,
        kernel=kernel.kernel.leg,
        settings=settings.leg,
        artifact=artifact.outcome.leg,
    )
    return RunRecord(
        verdict=verdict.decide(findings, legs, model=str(request.model)),
        first_divergence=graph.first_divergence
        or kernel.first_divergence
        or settings.first_divergence
        or artifact.outcome.first_divergence,
        legs=legs,
        scores=_scores(inputs.fixture, graph_runs, artifact.logits, engine),
        findings=findings,
        engines=engines,
        subject=_subject(request, inputs, engine),
        repro=request.repro,
    )


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
    return [explaining.told(f, explanation) if f.kind == "engine.graph" else f for f in findings]


def _under_settings(finding: Finding, request: RunRequest) -> Finding:
    """An engine that was told other hyperparameters is not accused without saying so."""
    told = [*request.overrides, *(f"{name} {value:g}" for name, value in rope_parameters(request.engine).items())]
    if finding.kind != "engine.graph" or not told:
        return finding
    return finding.model_copy(update={"message": f"{finding.message}; under {', '.join(told)}"})


def _settings(work: Work, engine: EngineRuns) -> SettingsOutcome:
    """The callback's pairs, and the grid's cells on the native run."""
    if engine.native is None or work.request.grid is None:
        return settings_leg.judge(engine.pairs, reason=engine.reason)
    with work.timings.step("settings"):
        strict = None if engine.strict is None else Strict(engine.strict.open().read("logits"))
        cells = run_grid(work, load_grid(work.request.grid), engine.native, strict)
    # The leg passes without the cells that were not compared, and says why; the base's own setting is none of them.
    unheard = [
        f"{row.label}: {row.reason}"
        for row in cells.rows
        if row.status == "not judged" or (row.status == "not run" and (row.changes or row.feed != WHOLE.way))
    ]
    reason = "; ".join(part for part in (engine.reason, *unheard) if part) or None
    judged = settings_leg.judge([*engine.pairs, *cells.pairs], reason=reason)
    return SettingsOutcome(judged.leg, judged.first_divergence, [*judged.findings, *cells.findings])


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


def _graph(runs: GraphRuns | None, engine: EngineRuns) -> GraphOutcome:
    if runs is None or engine.strict is None:
        return GraphOutcome(GraphLeg(reason=engine.reason or "the strict engine did not run"), None, [])
    return graph_leg.judge(runs.definition, runs.conventions, engine_taps=engine.strict.taps, reference_taps=runs.taps)


def _artifact(work: Work, precision: Precision, artifact_logits: Logits | None) -> ArtifactSide:
    if work.inputs.checkpoint is None:
        return artifact_side.not_run("there is no checkpoint to compare with: give it with --checkpoint")
    return artifact_side.run_all(work, work.inputs.checkpoint, precision, artifact_logits)


# -- the record ---------------------------------------------------------------------------------------


def _score(logits: Logits, fixture: Fixture) -> Score:
    nll = nll_per_position(logits[fixture.scored_positions()], fixture.next_ids())
    return Score(ppl=perplexity(nll), nll=mean_nll(nll), n=len(nll))


def _scores(fixture: Fixture, graph_runs: GraphRuns | None, others: dict[str, Logits], engine: EngineRuns) -> Scores:
    by_reference: dict[str, Logits] = {}
    if graph_runs is not None:
        by_reference["artifact"] = graph_runs.logits
        if graph_runs.convention_logits is not None:
            by_reference["artifact, ggml's conventions"] = graph_runs.convention_logits
    by_reference |= others
    by_engine = {name: run.open().read("logits") for name, run in engine.named.items()}
    return Scores(
        reference={name: _score(logits, fixture) for name, logits in by_reference.items()},
        engine={name: _score(logits, fixture) for name, logits in by_engine.items()},
    )


def _subject(request: RunRequest, inputs: Inputs, engine: EngineRuns) -> Subject:
    artifact, checkpoint, fixture = inputs.artifact, inputs.checkpoint, inputs.fixture
    native: EngineRun | None = engine.native or engine.strict
    info = native.info if native is not None else {}
    return Subject(
        artifact=artifact_subject(request.model, artifact),
        checkpoint=checkpoint_subject(request.checkpoint, checkpoint) if request.checkpoint and checkpoint else None,
        fixture=fixture_subject(fixture),
        engine=engine_subject(native.settings if native else request.engine, info, request.overrides),
        machine=machine_subject(),
    )


def _stamps(inputs: Inputs) -> list[tuple[str, int, int]]:
    """Path, size and time of every file that the legs read one after another."""
    paths = [*inputs.artifact.paths, *(inputs.checkpoint.paths if inputs.checkpoint else [])]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
