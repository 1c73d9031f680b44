"""`matrix`: the settings leg in full, one engine and one artifact under a grid of settings that must not matter.

The base is the engine as it was asked for. The strict engine (the artifact as F32, and settings that round least)
says how far honest rounding goes; where it cannot be had, the reference does if it knows the architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from diffharness import verdict
from diffharness.engine.crash import EngineCrash
from diffharness.engine.runner import Engine, EngineRun, check_overrides
from diffharness.engine.strict import strict_settings
from diffharness.engine.survive import survive
from diffharness.errors import ArtifactFileError, DiffharnessError, OutputError
from diffharness.legs import settings as settings_leg
from diffharness.pipeline import overrides, strict_way
from diffharness.pipeline.cell_runs import Strict
from diffharness.pipeline.crashes import crash_finding, crash_reason
from diffharness.pipeline.folder import run_folder
from diffharness.pipeline.grid_run import GridOutcome, run_grid
from diffharness.pipeline.grids import DEFAULT, Cell, load_grid
from diffharness.pipeline.inputs import Inputs, choose_fixture
from diffharness.pipeline.reference_runs import Precision, logits_of
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.subjects import artifact_subject, engine_subject, fixture_subject, machine_subject
from diffharness.pipeline.timing import Timings
from diffharness.pipeline.work import Work
from diffharness.records import Finding, Legs, Subject
from diffharness.records.legs import Leg
from diffharness.records.matrix import MatrixBase, MatrixRecord
from diffharness.weights.gguf_file import open_gguf

DEFAULT_TOKENS = 256


@dataclass(frozen=True)
class MatrixRequest(RunRequest):
    """One matrix: `grid` is a name in configs/matrix.yaml or a file, `cells` keep those whose label holds one."""

    grid: str = DEFAULT
    cells: tuple[str, ...] = ()
    taps: bool = False


def run_matrix(request: MatrixRequest) -> MatrixRecord:
    """Every cell of the grid, each judged against the base.

    Raises BadInputError for unfit inputs or grids. A base that dies is replaced by the nearest settings that
    survive; one that no settings survive is a record too. With `request.out` the folder keeps the captures of base
    and strict engine.
    """
    check_overrides(request.overrides)
    cells = load_grid(request.grid, request.cells)
    timings = Timings()
    with timings.step("total"), contextlib.ExitStack() as stack:
        with timings.step("open"):
            inputs = _open(request, stack)
        folder = stack.enter_context(run_folder(request.out))
        record = _run(Work(request, inputs, folder, timings), request, cells)
    record.timings = timings.seconds
    return record


# -- inputs -------------------------------------------------------------------------------------------


def _open(request: MatrixRequest, stack: contextlib.ExitStack) -> Inputs:
    """Any model that llama.cpp runs: the reference need not know it."""
    artifact = stack.enter_context(open_gguf(request.model))
    if not isinstance(artifact.metadata.get("general.architecture"), str):
        raise ArtifactFileError(f"{artifact.label} does not say which architecture it is")
    fixture, tokens = choose_fixture(
        artifact, None, request.fixture, request.n_tokens, request.engine, default_tokens=DEFAULT_TOKENS
    )
    if request.n_tokens is None and fixture.n_tokens > DEFAULT_TOKENS:
        fixture = fixture.first(DEFAULT_TOKENS)
    inputs = Inputs(artifact, None, fixture, tokens)
    if inputs.n_ctx_train is not None:
        fixture.check_context(inputs.n_ctx_train)
    return inputs


# -- base and strict engine ---------------------------------------------------------------------------


@dataclass
class _Ran:
    run: EngineRun | None = None
    survived: str | None = None
    findings: list[Finding] = field(default_factory=list)
    reason: str | None = None


def _base(work: Work) -> _Ran:
    """The base's logits; after a death those of the nearest settings that survive."""
    request = work.request
    model, chunks = work.inputs.artifact.paths[0], work.inputs.fixture.chunks()
    out = work.folder / "engine-base.safetensors"
    request.say("engine: base")
    with work.timings.step("engine: base"):
        try:
            run = Engine(request.engine).capture(model, chunks, out, taps=(), overrides=request.overrides)
            return _Ran(run)
        except EngineCrash as crash:
            if not crash.is_unusable:
                request.say(f"the engine died ({crash.message}); looking for settings that survive")
            found = survive(crash, request.engine, model, chunks, out, taps=(), overrides=request.overrides)
            reason = None if found.run is not None else crash_reason("base", crash)
            return _Ran(found.run, found.label, [crash_finding("base", crash, found)], reason)


@contextlib.contextmanager
def _strict(work: Work) -> Iterator[tuple[Strict | None, str | None]]:
    """The strict engine's logits and file for the time of the block, or the reference's logits; else the reason why."""
    request, chunks = work.request, work.inputs.fixture.chunks()
    with contextlib.ExitStack() as stack:
        strict, reason = None, None
        try:
            chosen = stack.enter_context(strict_way.strict_model(work))
            request.say("engine: strict")
            with work.timings.step("engine: strict"):
                settings, out = strict_settings(request.engine), work.folder / "engine-strict.safetensors"
                run = chosen.model.capture(settings, chunks, out, taps=(), overrides=request.overrides)
            # of slices there is no file to run in other ways: cells that need that are not judged
            strict = Strict(run.open().read("logits"), chosen.path, settings)
        except (EngineCrash, OutputError) as error:
            strict, reason = _reference(work), error.message
        yield strict, reason


def _reference(work: Work) -> Strict | None:
    """The reference in the strict engine's place, where it knows the model."""
    work.request.say("reference, in the strict engine's place")
    try:
        with work.timings.step("reference"):
            precision = Precision(work.request.dtype, work.request.device)
            return Strict(logits_of(work.inputs.artifact, work.inputs.fixture, precision).astype(np.float32))
    except DiffharnessError:
        return None


# -- the record ---------------------------------------------------------------------------------------


def _run(work: Work, request: MatrixRequest, cells: Sequence[Cell]) -> MatrixRecord:
    artifact = work.inputs.artifact
    findings = [*work.inputs.tokens.findings, *overrides.check_for(request.overrides, artifact, request.engine)]
    base = _base(work)
    findings += base.findings
    outcome, strict, reason = GridOutcome(), None, base.reason
    if base.run is not None:
        with _strict(work) as (strict, why):
            with work.timings.step("cells"):
                outcome = run_grid(work, cells, base.run, strict, taps=request.taps)
            if why is not None:
                instead = "what rounds otherwise is not judged" if strict is None else "the reference stands in for it"
                reason = f"there is no strict engine to measure honest rounding by ({why}); {instead}"
    findings += outcome.findings
    leg = settings_leg.judge(outcome.pairs, reason=reason)
    findings += leg.findings
    legs = Legs(settings=leg.leg)
    info = base.run.info if base.run is not None else {}
    settings = base.run.settings if base.run is not None else request.engine
    return MatrixRecord(
        verdict=verdict.decide(findings, legs, model=str(request.model), needs={"settings"}),
        leg=Leg(status=leg.leg.status, reason=leg.leg.reason, logits=leg.leg.logits),
        base=MatrixBase(
            settings=settings.model_dump(mode="json"),
            survived=base.survived,
            strict=outcome.noise,
            control="none" if strict is None else "strict engine" if strict.settings is not None else "reference",
        ),
        cells=outcome.rows,
        findings=findings,
        subject=Subject(
            artifact=artifact_subject(request.model, work.inputs.artifact),
            fixture=fixture_subject(work.inputs.fixture),
            engine=engine_subject(settings, info, request.overrides),
            machine=machine_subject(),
        ),
        repro=request.repro,
    )
