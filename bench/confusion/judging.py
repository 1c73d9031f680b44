"""What `inspect` and the artifact leg of `run` say of a case, beside the truth."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.confusion.cases import EMBEDDED, Case
from bench.confusion.files import Files
from diffharness import verdict
from diffharness.errors import ArtifactFileError
from diffharness.fixture import load_fixture
from diffharness.legs import tokens as tokens_leg
from diffharness.metrics import nll_per_position, perplexity
from diffharness.pipeline import artifact_side
from diffharness.pipeline.inputs import Inputs, open_artifact, open_checkpoint
from diffharness.pipeline.inspecting import InspectRequest, inspect
from diffharness.pipeline.reference_runs import Precision
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.timing import Timings
from diffharness.pipeline.work import Work
from diffharness.records import LegName, Legs
from diffharness.settings import EngineSettings, Tolerances

N_TOKENS = 512  # of the embedded model's held-out text
PPL_MOVE = 0.01  # relative to the checkpoint's, beyond which damage must be found
_LEG: tuple[LegName, ...] = ("artifact",)


@dataclass(frozen=True)
class Said:
    """One judge's word."""

    kinds: tuple[str, ...]  # the verdicts that hold, the first of them first
    tensors: frozenset[str] = frozenset()  # called damaged
    patterns: frozenset[str] = frozenset()
    ratios: Mapping[str, float] = field(default_factory=dict)  # of `inspect`: relative error over the control's
    seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """The largest."""
        return max(self.ratios.values(), default=0.0)


@dataclass(frozen=True)
class Judged:
    """A case with both judges' words. `faults` are what is wrong with them; `excused` why silence is right."""

    case: Case
    touched: frozenset[str]
    inspect: Said
    run: Said | None
    ppl: float | None = None  # of the file, over the clean control's
    faults: tuple[str, ...] = ()
    excused: str | None = None
    summary: str = ""

    @property
    def move(self) -> float | None:
        """Relative change of perplexity against a clean quantization to the same types."""
        return None if self.ppl is None else self.ppl - 1


@dataclass
class Judge:
    """Judges cases, one file at a time."""

    files: Files
    settings: EngineSettings
    tolerances: Tolerances

    def judge(self, case: Case, *, with_run: bool = True) -> Judged:
        """`with_run`: also by the artifact leg, whose forwards take longer than all the rest."""
        path, done = self.files.made(case)
        checkpoint = self.files.claimed(case.base.model)
        summary, by_inspect = self._inspect(path, checkpoint)
        by_run, ppl = self._run(case, path, checkpoint) if with_run else (None, None)
        if case.base.model != EMBEDDED and case.truth != "lineage":
            ppl = None  # random weights: no perplexity means anything
        touched = frozenset(done.tensors) if done is not None else frozenset()
        judged = Judged(case, touched, by_inspect, by_run, ppl, summary=summary)
        faults, excused = faults_of(judged, math.sqrt(self.tolerances["artifact.tensor_factor"]))
        return replace(judged, faults=tuple(faults), excused=excused)

    def _inspect(self, path: Path, checkpoint: Path) -> tuple[str, Said]:
        begin = time.perf_counter()
        request = InspectRequest(path, checkpoint, self.settings, self.tolerances)
        try:
            record = inspect(request)
        except ArtifactFileError as error:
            return error.message, Said(("artifact.file",), seconds=time.perf_counter() - begin)
        drifted = frozenset(row.name for row in record.tensors if row.drifted)
        rows = [row for row in record.tensors if row.ratio is not None and row.control is not None]
        return record.verdict.summary, Said(
            tuple(record.verdict.all),
            drifted,
            frozenset(row.kind for row in record.patterns),
            {row.name: row.ratio for row in rows if row.ratio is not None},
            time.perf_counter() - begin,
        )

    def _run(self, case: Case, path: Path, folder: Path) -> tuple[Said, float | None]:
        begin = time.perf_counter()
        fixture = load_fixture(self.files.fixture(case.base.model))
        fixture = fixture.first(min(len(fixture.ids), N_TOKENS))
        try:
            artifact = open_artifact(path)
        except ArtifactFileError:
            return Said(("artifact.file",), seconds=time.perf_counter() - begin), None
        try:
            checkpoint = open_checkpoint(folder, artifact)
            inputs = Inputs(artifact, checkpoint, fixture, tokens_leg.not_run("not judged here"))
            request = RunRequest(path, self.settings, self.tolerances, folder)
            with tempfile.TemporaryDirectory() as scratch:
                work = Work(request, inputs, Path(scratch), Timings())
                side = artifact_side.run_all(work, checkpoint, Precision(), None)
            checkpoint.close()
        finally:
            artifact.close()
        decided = verdict.decide(side.outcome.findings, Legs(artifact=side.outcome.leg), needs=_LEG)
        rows = fixture.scored_positions()
        ppl = {name: perplexity(nll_per_position(of[rows], fixture.next_ids())) for name, of in side.logits.items()}
        damaged = frozenset(row.name for row in side.outcome.leg.tensors if row.damaged)
        said = Said(tuple(decided.all), damaged, seconds=time.perf_counter() - begin)
        return said, ppl["artifact"] / ppl.get("control", ppl["checkpoint"])


# -- right or wrong -----------------------------------------------------------------------------------


def faults_of(judged: Judged, band: float) -> tuple[list[str], str | None]:
    """What is wrong with the words, and why silence is right where it is; `band` is the control's, over its error."""
    check: dict[str, Callable[[], list[str]]] = {
        "clean": lambda: _of_clean(judged),
        "weights": lambda: _of_weights(judged, band),
        "metadata": lambda: _of_kind(judged, "artifact.metadata"),
        "file": lambda: _of_kind(judged, "artifact.file"),
        "lineage": lambda: _of_lineage(judged),
    }
    found = check[judged.case.truth]()
    silent = judged.case.truth in ("weights", "metadata") and all(
        said.kinds == ("agree",) for said in (judged.inspect, judged.run) if said is not None
    )
    if silent and (reason := _below(judged, band)) is not None:
        return [], reason
    return found, None


def _below(judged: Judged, band: float) -> str | None:
    """Why a case that nobody named need not be: it hardly moves perplexity and no tensor is beyond the band."""
    if judged.case.truth != "weights":
        return None
    if judged.inspect.ratio > band or abs(judged.move or 0.0) > PPL_MOVE:
        return None
    moved = "perplexity of random weights means nothing" if judged.move is None else f"perplexity {judged.move:+.2%}"
    return f"error {judged.inspect.ratio:.2f} times the control's, {moved}"


def _of_clean(judged: Judged) -> list[str]:
    return [
        f"{name} calls a clean file {', '.join(said.kinds)}"
        for name, said in _judges(judged)
        if said.kinds != ("agree",)
    ]


def _of_weights(judged: Judged, band: float) -> list[str]:
    beyond = {name for name in judged.touched if judged.inspect.ratios.get(name, 0.0) > band}
    found = _of_kind(judged, "artifact.weights", "artifact.file" if _may_be_the_files(judged.case) else None)
    for name, said in _judges(judged):
        if wrong := said.tensors - judged.touched:
            found.append(f"{name} accuses {len(wrong)} untouched tensors: {_some(wrong)}")
        if "artifact.weights" in said.kinds and (missed := beyond - said.tensors):
            found.append(f"{name} leaves out {len(missed)} of {len(beyond)} tensors beyond the band: {_some(missed)}")
    wanted = judged.case.patterns
    if wanted and "artifact.weights" in judged.inspect.kinds and not wanted & judged.inspect.patterns:
        named = ", ".join(sorted(judged.inspect.patterns)) or "no pattern"
        found.append(f"inspect names {named}, not {' or '.join(sorted(wanted))}")
    if any("rope-base" in how for how in judged.case.how):
        found += _of_kind(judged, "artifact.metadata")
    return found


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3])


def _may_be_the_files(case: Case) -> bool:
    """Whether the bytes may hold an infinite scale now, or the file lacks a tensor without which there is no model."""
    return any(
        how.startswith(("bit-flips", "byte-shift", "double-scales", "missing", "rope-freqs")) for how in case.how
    )


def _of_kind(judged: Judged, kind: str, other: str | None = None) -> list[str]:
    return [
        f"{name} says {', '.join(said.kinds)}, not {kind}"
        for name, said in _judges(judged)
        if kind not in said.kinds and other not in said.kinds
    ]


def _of_lineage(judged: Judged) -> list[str]:
    """`run` has the forwards to tell; `inspect` may say that it cannot, but not that it is damage."""
    found = []
    if judged.run is not None and judged.run.kinds != ("artifact.lineage",):
        found.append(f"run says {', '.join(judged.run.kinds)}, not artifact.lineage")
    if "artifact.weights" in judged.inspect.kinds:
        found.append(f"inspect says {', '.join(judged.inspect.kinds)}")
    return found


def _judges(judged: Judged) -> list[tuple[str, Said]]:
    return [("inspect", judged.inspect)] + ([("run", judged.run)] if judged.run is not None else [])
