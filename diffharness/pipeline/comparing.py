"""`compare`: two run folders against each other, from what they hold; no model is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffharness.captures import Capture
from diffharness.errors import BadInputError, InconclusiveError
from diffharness.legs.saved import compare_captures
from diffharness.records import RunRecord, Subject, load_record
from diffharness.records.compare import CaptureRow, CompareRecord, RunSide, Unlike
from diffharness.settings import Tolerances
from diffharness.words import listed

TOLERANCE = "compare.nmse"
_CAPTURES = "*.safetensors"
_ARTIFACT, _FIXTURE = "artifact", "fixture"
# What may differ without a word: where things lie, and how the run was told to use this machine.
_UNTOLD = frozenset({"name", "time_limit_s"})


@dataclass(frozen=True)
class CompareRequest:
    """`a` is the golden run. `tolerance` is an NMSE, None for the tolerances' own; `anyway` compares unlike inputs."""

    a: Path
    b: Path
    tolerances: Tolerances
    tolerance: float | None = None
    anyway: bool = False
    repro: str = ""
    say: Callable[[str], None] = field(default=lambda text: None, repr=False)


def compare(request: CompareRequest) -> CompareRecord:
    """Every capture, tap, token and score that both runs have; a capture that only A has, the golden run, differs.

    Raises BadInputError for a folder that is no run's, or runs of different artifacts or fixtures (unless
    `anyway`); InconclusiveError where the two have no capture and no tap in common.
    """
    a, b = (_opened(path) for path in (request.a, request.b))
    unlike = list(_unlike(a, b))
    _refuse_unlike(request, unlike)
    tolerance = request.tolerances[TOLERANCE] if request.tolerance is None else request.tolerance
    names_a, names_b = (_captures(path) for path in (request.a, request.b))
    rows = []
    for name in sorted(names_a.keys() & names_b.keys()):
        request.say(f"comparing {name}")
        rows.append(compare_captures(name, Capture(names_a[name]), Capture(names_b[name]), tolerance=tolerance))
    if not any(row.taps for row in rows):
        raise InconclusiveError(
            f"{request.a} and {request.b} keep no tap in common: {_some(names_a)} and {_some(names_b)}",
            hint="make both with `diffharness run --out DIR`, and keep its *.safetensors",
        )
    differing = [row for row in rows if not row.ok and row.taps]
    verdicts_differ = sorted(a.verdict.all) != sorted(b.verdict.all)
    lacking = sorted(names_a.keys() - names_b.keys())
    summary = _summary(rows, differing, a, b, tolerance)
    if lacking:
        summary = f"{summary.removesuffix('.')}; B lacks {listed(lacking, 4)}."
    return CompareRecord(
        outcome="differs" if differing or verdicts_differ or lacking else "same",
        summary=summary,
        tolerance=tolerance,
        a=_side(request.a, a),
        b=_side(request.b, b),
        unlike=unlike,
        captures=rows,
        only_a=lacking,
        only_b=sorted(names_b.keys() - names_a.keys()),
        repro=request.repro,
    )


def _opened(path: Path) -> RunRecord:
    if not path.is_dir():
        raise BadInputError(
            f"expected the folder of a run, found {'a file' if path.exists() else 'nothing'}: {path}",
            hint="`diffharness run --out DIR` makes one: its record and its captures",
        )
    return load_record(path)


def _captures(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob(_CAPTURES)}


def _some(names: dict[str, Path]) -> str:
    return listed(sorted(names), 4) if names else "none"


def _refuse_unlike(request: CompareRequest, unlike: list[Unlike]) -> None:
    inputs = [row for row in unlike if row.what in (_ARTIFACT, _FIXTURE)]
    if inputs and not request.anyway:
        told = "; ".join(f"{row.what}: {row.a} and {row.b}" for row in inputs)
        raise BadInputError(
            f"{request.a} and {request.b} are not runs of the same: {told}",
            hint="--anyway compares them all the same, token by token from the first",
        )


def _unlike(a: RunRecord, b: RunRecord) -> Iterator[Unlike]:
    """What the two records say differently of inputs, engine and machine."""
    one, other = a.subject, b.subject
    if (one.artifact.sha256 or one.artifact.path) != (other.artifact.sha256 or other.artifact.path):
        yield Unlike(what=_ARTIFACT, a=_artifact(one), b=_artifact(other))
    if (one.fixture and one.fixture.sha256) != (other.fixture and other.fixture.sha256):
        yield Unlike(what=_FIXTURE, a=_fixture(one), b=_fixture(other))
    yield from _pair("checkpoint", *(s.checkpoint.sha256 if s.checkpoint else None for s in (one, other)))
    for what in ("version", "commit", "bindings", "system_info"):
        yield from _pair(f"engine {what}", *(getattr(s.engine, what, None) for s in (one, other)))
    settings: list[dict[str, Any]] = [s.engine.settings if s.engine else {} for s in (one, other)]
    for key in sorted({*settings[0], *settings[1]} - _UNTOLD):
        yield from _pair(f"setting {key}", *(side.get(key) for side in settings))
    yield from _pair("overrides", *(", ".join(s.engine.overrides) if s.engine else "" for s in (one, other)))
    for key in ("cpu", "cores", "system", "diffharness"):
        yield from _pair(f"machine {key}", *(s.machine.get(key) for s in (one, other)))


def _pair(what: str, a: Any, b: Any) -> Iterator[Unlike]:
    if a != b:
        yield Unlike(what=what, a=a, b=b)


def _artifact(subject: Subject) -> str:
    sha256 = subject.artifact.sha256
    return f"{subject.artifact.path} (sha256 {sha256[:16]})" if sha256 else subject.artifact.path


def _fixture(subject: Subject) -> str:
    about = subject.fixture
    return f"{about.name}, {about.n_tokens} tokens (sha256 {(about.sha256 or '')[:16]})" if about else "none"


def _side(path: Path, record: RunRecord) -> RunSide:
    engine = record.subject.engine
    build = " ".join(part for part in (engine.version, engine.commit) if part) if engine else ""
    return RunSide(
        path=str(path),
        verdict=record.verdict.primary,
        summary=record.verdict.summary,
        first_divergence=record.first_divergence,
        engine=build or None,
        reference_scores=record.scores.reference,
        engine_scores=record.scores.engine,
    )


def _summary(rows: list[CaptureRow], differing: list[CaptureRow], a: RunRecord, b: RunRecord, tolerance: float) -> str:
    verdicts = ""
    if sorted(a.verdict.all) != sorted(b.verdict.all):
        verdicts = f"; the verdict was {', '.join(a.verdict.all)} and is {', '.join(b.verdict.all)}"
    n_taps = sum(len(row.taps) for row in rows)
    if not differing:
        tokens = max(row.n_tokens for row in rows)
        return (
            f"{n_taps} taps of {len(rows)} captures agree within NMSE {tolerance:.0e} at all {tokens} tokens{verdicts}."
        )
    first = differing[0]
    where = f"{first.first_tap}, token {first.first_token}" if first.first_tap else "the logits"
    others = f" and in {len(differing) - 1} more captures" if len(differing) > 1 else ""
    return f"they differ by more than NMSE {tolerance:.0e} in {first.name}, first at {where}{others}{verdicts}."
