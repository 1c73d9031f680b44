"""`gate`: what the rules of a gate file are read off is measured, and judged.

Only what some rule needs is run. A step that fails on the file leaves its rules not run, with the reason; what is
wrong with the request itself is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from diffharness import fixture as fixtures
from diffharness import kld
from diffharness.engine.runner import EngineCrash
from diffharness.errors import BadInputError, DiffharnessError, EngineError, InconclusiveError
from diffharness.forensics.gate import KINDS, Evidence, Gate, NotRun, conclude, judge
from diffharness.forensics.gate.readings import Need
from diffharness.pipeline.grade_inputs import GradeRequest
from diffharness.pipeline.grading import grade
from diffharness.pipeline.inputs import DEFAULT_TEXT, choose_fixture
from diffharness.pipeline.inspecting import InspectRequest, inspect
from diffharness.pipeline.pairs import open_pair
from diffharness.pipeline.request import Say
from diffharness.pipeline.subjects import artifact_subject, checkpoint_subject, machine_subject
from diffharness.pipeline.timing import Timings
from diffharness.records.gate import GateRecord, GateScores
from diffharness.records.grade import GradeRecord, GradeRow
from diffharness.records.inspect import InspectRecord
from diffharness.records.legs import TokensLeg
from diffharness.records.run import Finding
from diffharness.records.subject import ArtifactSubject, CheckpointSubject, Subject
from diffharness.settings import EngineSettings, Tolerances
from diffharness.taps import split

T = TypeVar("T")


@dataclass(frozen=True)
class GateRequest:
    """One gate. `gate_name` is the file that the rules came from; `engine` are llama.cpp's settings."""

    model: Path
    checkpoint: Path
    gate: Gate
    gate_name: str
    engine: EngineSettings
    tolerances: Tolerances
    fixture: str | None = None
    n_tokens: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    repro: str = ""
    say: Say = field(default=lambda text: None, repr=False)


def run_gate(request: GateRequest) -> GateRecord:
    """Measure what the rules need, and judge.

    Raises ArtifactFileError for what is no GGUF, CheckpointError for a checkpoint that is unfit or of another model,
    FixtureError for a fixture that is none.
    """
    timings = Timings()
    with timings.step("total"):
        _check_fixture(request.fixture)
        record = _run(request, timings)
    record.timings = timings.seconds
    return record


def _run(request: GateRequest, timings: Timings) -> GateRecord:
    needed = {KINDS[name].needs for name in request.gate.rules}
    with timings.step("open"):
        artifact, checkpoint, bits = _opened(request)

    def step(need: Need, run: Callable[[], T]) -> T | NotRun:
        if need not in needed:
            return NotRun("no rule asks for it")
        with timings.step(need):
            try:
                return run()
            except (BadInputError, EngineError, InconclusiveError) as error:
                return NotRun(_reason(error))

    inspection = step("tensors", lambda: _inspect(request))
    tokens = step("tokens", lambda: _tokens(request))
    graded = step("forward", lambda: _grade(request))
    row = graded if isinstance(graded, NotRun) else graded.rows[0]
    leg = tokens if isinstance(tokens, NotRun) else tokens[0]
    rules = judge(request.gate, Evidence(inspection, row, leg, bits))
    outcome, summary = conclude(rules)
    findings = [*(inspection.findings if isinstance(inspection, InspectRecord) else [])]
    findings += [] if isinstance(tokens, NotRun) else tokens[1]
    return GateRecord(
        outcome=outcome,
        summary=summary,
        gate=request.gate_name,
        rules=rules,
        scores=_scores(row),
        findings=findings,
        subject=Subject(
            artifact=artifact,
            checkpoint=checkpoint,
            fixture=None if isinstance(graded, NotRun) else graded.fixture,
            engine=None if isinstance(graded, NotRun) else graded.engine,
            machine=machine_subject(),
        ),
        repro=request.repro,
    )


# -- steps --------------------------------------------------------------------------------------------


def _check_fixture(name: str | None) -> None:
    """Raise FixtureError for what is no fixture, which is the caller's mistake and not the file's."""
    path = fixtures.resolve(name or DEFAULT_TEXT)
    if path.suffix == ".json":
        fixtures.load_fixture(path)
    else:
        fixtures.read_text(path)


def _opened(request: GateRequest) -> tuple[ArtifactSubject, CheckpointSubject, float]:
    """What the two are, and the bits per weight of the matrices inside of the layers."""
    pair = open_pair(request.model, request.checkpoint)
    try:
        inside = [t for t in pair.file.tensors.values() if split(t.name)[0] is not None and len(t.shape) > 1]
        bits = 8 * sum(t.n_bytes for t in inside) / max(1, sum(t.n_elements for t in inside))
        artifact = artifact_subject(request.model, pair.file)
        return artifact, checkpoint_subject(request.checkpoint, pair.checkpoint), bits
    finally:
        pair.close()


def _inspect(request: GateRequest) -> InspectRecord:
    return inspect(
        InspectRequest(request.model, request.checkpoint, request.engine, request.tolerances, say=request.say)
    )


def _tokens(request: GateRequest) -> tuple[TokensLeg, list[Finding]]:
    request.say("comparing tokenizers")
    pair = open_pair(request.model, request.checkpoint)
    try:
        _, outcome = choose_fixture(pair.file, pair.checkpoint, request.fixture, request.n_tokens, request.engine)
        return outcome.leg, outcome.findings
    finally:
        pair.close()


def _grade(request: GateRequest) -> GradeRecord:
    graded = grade(
        GradeRequest(
            models=(str(request.model),),
            engine=request.engine,
            tolerances=request.tolerances,
            checkpoint=request.checkpoint,
            fixture=request.fixture,
            n_tokens=request.n_tokens,
            with_engine="engine" in request.gate.rules,
            with_control="kl_control" in request.gate.rules,
            device=request.device,
            dtype=request.dtype,
            say=request.say,
        )
    )
    n_scored = graded.fixture.n_scored
    if n_scored <= kld.FEWEST:
        raise InconclusiveError(f"{n_scored} scored positions are too few to judge by: give --tokens {4 * kld.FEWEST}")
    return graded


def _reason(error: DiffharnessError) -> str:
    return f"the engine died: {error.message}" if isinstance(error, EngineCrash) else error.message


def _scores(row: GradeRow | NotRun) -> GateScores:
    if isinstance(row, NotRun):
        return GateScores()
    return GateScores(
        artifact=row.ppl,
        checkpoint=row.statistics.ppl_base if row.statistics is not None else None,
        engine=row.engine.ppl if row.engine is not None else None,
    )
