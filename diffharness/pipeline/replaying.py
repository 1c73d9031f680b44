"""The kernel leg: record a few evaluations, replay each node, and try the accused one under other settings.

Nothing of the reference is needed, so that models of every architecture can be replayed. The memory that it takes is
that of a few nodes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffharness import fixture as fixtures
from diffharness import verdict
from diffharness.engine.crash import EngineCrash
from diffharness.engine.recorder import Evaluation, Recorder, one_by_one, schedule
from diffharness.engine.runner import RESIDUALS, Engine, States, check_overrides
from diffharness.engine.survive import survive
from diffharness.errors import ArtifactFileError, FixtureError, InconclusiveError, SettingsError, UnsupportedError
from diffharness.fixture import Fixture
from diffharness.legs import kernel as kernel_leg
from diffharness.legs.kernel import KernelOutcome
from diffharness.machine import usable_cores
from diffharness.pipeline import inputs as run_inputs
from diffharness.pipeline.crashes import crash_finding, crash_reason
from diffharness.pipeline.request import RunRequest, Say
from diffharness.pipeline.subjects import artifact_subject, engine_subject, fixture_subject, machine_subject
from diffharness.pipeline.timing import Timings
from diffharness.records import ArtifactSubject, Finding, KernelLeg, Legs, NodeRow, Subject
from diffharness.records.replay import ReplayRecord
from diffharness.replay.driver import Outcome, replay
from diffharness.settings import EngineSettings, Floors
from diffharness.weights.gguf_file import GgufFile, open_gguf

N_TOKENS = 64  # of the batch
N_SINGLE = 2
_SEED = 20  # of the ids for a model without a vocabulary

# What may cure a node that is wrong, nearest first. One that survives the first row is wrong every time.
SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "the same settings again": {},
    "extra buffers off": {"extra_bufts": False},
    "flash attention off": {"flash_attn": "off"},
    "one thread": {"threads": 1},
}
ONE_BY_ONE = "one token at a time"


@dataclass(frozen=True)
class Recording:
    """What is recorded, of which model, by which engine."""

    artifact: GgufFile
    tokens: Sequence[int]
    settings: EngineSettings
    n_batch: int = N_TOKENS
    n_single: int = N_SINGLE
    overrides: tuple[str, ...] = ()
    states: States | None = None  # of a model that is a slice: what it is fed with, tokens being only counted
    first_row: int = 0  # of the states: that of the first token

    @property
    def evaluations(self) -> list[Evaluation]:
        return schedule(self.tokens, self.n_batch, self.n_single)

    def replayed(self, only: Sequence[str] = (), evaluations: Sequence[Evaluation] | None = None) -> Outcome:
        """Raises EngineCrash, FixtureError."""
        with (
            Recorder(
                self.settings,
                self.artifact.paths[0],
                self.evaluations if evaluations is None else evaluations,
                self.artifact.tensors,
                overrides=self.overrides,
                only=only,
                states=self.states,
                first_row=self.first_row,
            ) as nodes,
            _beside(self.settings.threads),
        ):
            return replay(nodes, self.artifact)


@contextmanager
def _beside(engine_threads: int) -> Iterator[None]:
    """torch on the cores that the engine leaves, at least one, as both work at once.

    More threads than cores wait for each other at every node: three to eight times the processor time, no gain.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, max(1, usable_cores() - engine_threads)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def replay_leg(recording: Recording, floors: Floors, say: Say = lambda text: None) -> KernelOutcome:
    """The kernel leg of one engine. One that dies is a finding, and what is replayed then are settings that survive.

    Where none do, and where the engine refuses, the leg did not run.
    """
    return _lasting(recording, floors, say)[0]


def _lasting(recording: Recording, floors: Floors, say: Say) -> tuple[KernelOutcome, Recording]:
    """The leg, and the recording that it is of: the one given, or one under the nearest settings that survive."""
    try:
        return judged(recording, floors, say), recording
    except EngineCrash as crash:
        if not crash.is_unusable:
            say(f"the engine died ({crash.message}); looking for settings that survive")
        return _surviving(recording, crash, floors, say)


def _surviving(recording: Recording, crash: EngineCrash, floors: Floors, say: Say) -> tuple[KernelOutcome, Recording]:
    """After a death while recording: the node that it died in, and the replay under settings that survive."""
    with tempfile.TemporaryDirectory(prefix="diffharness-") as folder:
        survival = survive(
            crash,
            recording.settings,
            recording.artifact.paths[0],
            [np.array(each.tokens) for each in recording.evaluations[-1:]],
            Path(folder) / "survived.safetensors",
            taps=RESIDUALS,  # with a callback, as recording has one
            overrides=recording.overrides,
        )
    finding = crash_finding(_DOING, crash, survival)
    if survival.settings is None:
        return _not_run(crash, finding), recording
    under = replace(recording, settings=survival.settings)
    try:
        found = judged(under, floors, say)
    except EngineCrash as again:
        found = _not_run(again, crash_finding(_DOING, again))
    reason = "; ".join(part for part in (f"replayed with {survival.label}", found.leg.reason) if part)
    leg = found.leg.model_copy(update={"reason": reason})
    return replace(found, leg=leg, findings=[finding, *found.findings]), under


def judged(recording: Recording, floors: Floors, say: Say = lambda text: None) -> KernelOutcome:
    """As `replay_leg`, but raises EngineCrash."""
    outcome = recording.replayed()
    on = [each for each in recording.evaluations if each.on]
    found = kernel_leg.judge(
        outcome,
        floors,
        n_batch=sum(len(each.tokens) for each in on if len(each.tokens) > 1),
        n_single=sum(len(each.tokens) == 1 for each in on),
    )
    if found.first is None:
        return found
    say(f"{found.first.node} ({found.first.op}) is wrong; looking for settings that cure it")
    return kernel_leg.with_cures(found, cures(recording, found.first, floors))


_DOING = "recording its nodes"


def _not_run(crash: EngineCrash, finding: Finding) -> KernelOutcome:
    return KernelOutcome(kernel_leg.numbers(None, reason=crash_reason(_DOING, crash)), [finding])


def cures(recording: Recording, accused: NodeRow, floors: Floors) -> dict[str, str]:
    """What becomes of a node under other settings: `cured`, `persists`, `absent`, or how the engine ended."""
    found: dict[str, str] = {}
    for label, changes in SWITCHES.items():
        try:
            settings = recording.settings.changed(**changes)
        except (SettingsError, ValueError):  # a quantized V cache, say, cannot do without flash attention
            continue
        if not changes or recording.settings.differences(settings):
            found[label] = _outcome(replace(recording, settings=settings), accused, floors)
    if accused.path == "batch":
        batch = recording.evaluations[-1].tokens
        alone = accused.model_copy(update={"path": "single"})
        found[ONE_BY_ONE] = _outcome(recording, alone, floors, one_by_one(batch))
    return found


def _outcome(
    recording: Recording, accused: NodeRow, floors: Floors, evaluations: Sequence[Evaluation] | None = None
) -> str:
    try:
        outcome = recording.replayed([accused.node], evaluations)
    except EngineCrash as crash:
        return crash.signal_name or crash.kind
    rows = [kernel_leg.node_row(each, floors) for each in outcome.replayed]
    same = [row for row in rows if kernel_leg.same_node(row, accused) and row.path == accused.path]
    if not same:
        return "absent"
    return "cured" if all(row.ok for row in same) else "persists"


# -- the command ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplayRequest:
    """One replay: of a run's request what concerns the engine, and how much is recorded."""

    run: RunRequest
    n_batch: int = N_TOKENS
    n_single: int = N_SINGLE
    timings: Timings = field(default_factory=Timings)


def replay_model(request: ReplayRequest) -> ReplayRecord:
    """Record and replay.

    Raises BadInputError for unfit inputs, but for an artifact that is no readable GGUF, which is a verdict; so is an
    engine that dies, and settings that survive are then looked for and replayed.
    """
    check_overrides(request.run.overrides)
    timings = request.timings
    with timings.step("total"):
        record = _ended_early(request)
    record.timings = timings.seconds
    return record


def _ended_early(request: ReplayRequest) -> ReplayRecord:
    run = request.run
    try:
        with open_gguf(run.model) as artifact:
            return _replayed(request, artifact)
    except UnsupportedError:
        raise
    except ArtifactFileError as error:
        evidence = {"offset": error.offset, "tensor": error.tensor, "hint": error.hint}
        finding = Finding(kind="artifact.file", leg=None, message=error.message, evidence=evidence)
    except EngineCrash as crash:
        finding = crash_finding("tokenizing", crash)
    except InconclusiveError as error:
        finding = Finding(kind="inconclusive", leg=None, message=error.message, next_step=error.hint)
    subject = Subject(artifact=ArtifactSubject(path=str(run.model)))
    return _record(request, KernelOutcome(KernelLeg(reason=finding.message), [finding]), subject)


def _replayed(request: ReplayRequest, artifact: GgufFile) -> ReplayRecord:
    run, timings = request.run, request.timings
    with timings.step("open"):
        fixture = _fixture(request, artifact)
    tokens = [int(token) for token in fixture.chunks()[0]]
    recording = Recording(artifact, tokens, run.engine, request.n_batch, request.n_single, run.overrides)
    on = recording.evaluations
    run.say(
        f"recording {len(on[-1].tokens)} tokens as a batch and {max(0, len(on) - 2)} alone, and replaying each node"
    )
    with timings.step("replay"):
        found, recording = _lasting(recording, run.tolerances, run.say)
    subject = Subject(
        artifact=artifact_subject(run.model, artifact),
        fixture=fixture_subject(fixture),
        engine=engine_subject(recording.settings, _info(recording.settings), run.overrides),
        machine=machine_subject(),
    )
    return _record(request, found, subject)


def _fixture(request: ReplayRequest, artifact: GgufFile) -> Fixture:
    """The tokens: of a text or fixture; for a model without a vocabulary ids by a fixed seed, if none are given."""
    run, n = request.run, request.n_batch + request.n_single
    if run.fixture is None and "tokenizer.ggml.tokens" not in artifact.metadata:
        ids = np.random.default_rng(_SEED).integers(0, artifact.vocab_size, size=n)
        return fixtures.from_ids([int(i) for i in ids], name="ids by a fixed seed", chunk=n)
    chosen, _ = run_inputs.choose_fixture(artifact, None, run.fixture, run.n_tokens, run.engine, default_tokens=n)
    room = len(chosen.chunks()[0])
    if request.n_batch > max(room, N_TOKENS):
        raise FixtureError(
            f"expected at most {room} tokens to evaluate together, the fixture's first chunk, found {request.n_batch}",
            hint="give fewer as --tokens, or a fixture of longer chunks as --fixture",
        )
    return chosen


def _info(settings: EngineSettings) -> Mapping[str, Any]:
    try:
        return Engine(settings).info()
    except EngineCrash:
        return {}


def _record(request: ReplayRequest, found: KernelOutcome, subject: Subject) -> ReplayRecord:
    legs = Legs(kernel=found.leg)
    decided = verdict.decide(found.findings, legs, model=str(request.run.model), needs={"kernel"})
    if decided.primary == "agree":
        decided = decided.model_copy(update={"summary": kernel_leg.agreement(found.leg), "next_step": None})
    return ReplayRecord(
        verdict=decided, kernel=found.leg, findings=found.findings, subject=subject, repro=request.run.repro
    )
