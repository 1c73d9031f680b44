"""What `grade` works on: artifacts, base and fixture, opened and checked against each other.

An artifact that cannot be graded keeps its row, which says why; only what leaves nothing to grade is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffharness.engine.runner import check_overrides
from diffharness.errors import (
    ArtifactFileError,
    BadInputError,
    CheckpointError,
    FixtureError,
    SettingsError,
    UnsupportedError,
)
from diffharness.fixture import Fixture
from diffharness.pipeline import grade_bf16, overrides
from diffharness.pipeline.inputs import choose_fixture, open_artifact, open_checkpoint
from diffharness.pipeline.request import Say
from diffharness.pipeline.subjects import artifact_subject
from diffharness.records.grade import GradeRow
from diffharness.records.run import Finding
from diffharness.records.subject import ArtifactSubject
from diffharness.reference import memory
from diffharness.settings import EngineSettings, Tolerances
from diffharness.tokenizer import gguf_tokenizer_sha256
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import GgufFile
from diffharness.weights.source import EMBEDDING

DEFAULT_TOKENS = 2048


@dataclass(frozen=True)
class GradeRequest:
    """One grading. `locate` turns a model's name into its path; `engine` are llama.cpp's settings."""

    models: tuple[str, ...]
    engine: EngineSettings
    tolerances: Tolerances
    checkpoint: Path | None = None
    against: str | None = None
    fixture: str | None = None
    n_tokens: int | None = None
    chunk: int | None = None
    with_engine: bool = True
    with_control: bool = False
    with_attention: bool = False
    overrides: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    matmul: Literal["full", "bf16"] = "full"  # full: in `dtype`
    out: Path | None = None
    repro: str = ""
    locate: Callable[[str], Path] = Path
    say: Say = field(default=lambda text: None, repr=False)


@dataclass
class Candidate:
    """One artifact and its row; `artifact` is None once the row has an error."""

    row: GradeRow
    artifact: GgufFile | None

    def drop(self, error: BadInputError) -> None:
        self.row.error, self.artifact = error.message, None


@dataclass(frozen=True)
class GradeInputs:
    """At least one candidate has an artifact."""

    candidates: list[Candidate]
    base: Checkpoint | GgufFile | None
    fixture: Fixture
    findings: list[Finding]  # of the tokenizers


def open_all(request: GradeRequest, stack: ExitStack) -> GradeInputs:
    """Everything opened, closed by `stack`; BadInputError where nothing is left to grade."""
    if request.checkpoint is not None and request.against is not None:
        raise SettingsError("expected one of --checkpoint and --against, found both")
    if request.with_control and request.checkpoint is None:
        raise SettingsError("expected a checkpoint to make the controls from", hint="give it with --checkpoint")
    if request.with_attention and request.checkpoint is None and request.against is None:
        raise SettingsError("expected a checkpoint to compare attention with", hint="give it with --checkpoint")
    if request.matmul == "bf16":
        grade_bf16.check(request.dtype, request.with_control)
    check_overrides(request.overrides)
    named = zip(request.models, labels(request.models), strict=True)
    candidates = [_candidate(request, name, label, stack) for name, label in named]
    if not _left(candidates):
        raise ArtifactFileError("; ".join(f"{one.row.error}" for one in candidates))
    base: Checkpoint | GgufFile | None = None
    if request.checkpoint is not None:
        base = _checkpoint(request.checkpoint, candidates, stack)
    elif request.against is not None:
        base = stack.enter_context(open_artifact(request.locate(request.against)))
    leading = _left(candidates)[0]
    fixture, outcome = choose_fixture(
        leading,
        base if isinstance(base, Checkpoint) else None,
        request.fixture,
        request.n_tokens,
        request.engine,
        default_tokens=max(DEFAULT_TOKENS, request.chunk or 0),
    )
    if request.chunk is not None:
        fixture = fixture.rechunked(request.chunk)
    _check_fit(candidates, base or leading, fixture, tokenizer=gguf_tokenizer_sha256(leading.metadata))
    return GradeInputs(candidates, base, fixture, outcome.findings)


def labels(models: Sequence[str]) -> list[str]:
    """File names, or whole names where two files are called alike; a model that is named twice is numbered."""
    names = [name.rsplit("/", 1)[-1] for name in models]
    shown = [name if names.count(name) == 1 else model for name, model in zip(names, models, strict=True)]
    return [
        label if shown.count(label) == 1 else f"{label} ({shown[: i + 1].count(label)})"
        for i, label in enumerate(shown)
    ]


def _left(candidates: Sequence[Candidate]) -> list[GgufFile]:
    return [one.artifact for one in candidates if one.artifact is not None]


def _candidate(request: GradeRequest, name: str, label: str, stack: ExitStack) -> Candidate:
    found = Candidate(GradeRow(label=label, artifact=ArtifactSubject(path=name)), None)
    try:
        artifact = stack.enter_context(open_artifact(request.locate(name)))
        notes = overrides.check(request.overrides, artifact.kv_types)
    except SettingsError:
        raise
    except BadInputError as error:
        found.drop(error)
        return found
    found.artifact = artifact
    found.row.artifact = artifact_subject(Path(name), artifact).model_copy(update={"path": name})
    n_params = sum(info.n_elements for info in artifact.tensors.values())
    found.row.bpw = 8 * sum(info.n_bytes for info in artifact.tensors.values()) / n_params
    found.row.notes = [note.message for note in notes]
    return found


def _checkpoint(folder: Path, candidates: Sequence[Candidate], stack: ExitStack) -> Checkpoint:
    """The checkpoint; candidates of another architecture or other shapes are dropped, as long as one is left."""
    found: list[Checkpoint] = []
    errors: list[CheckpointError] = []
    for one in candidates:
        if one.artifact is None:
            continue
        try:
            checkpoint = open_checkpoint(folder, one.artifact)
        except CheckpointError as error:
            one.drop(error)
            errors.append(error)
            continue
        stack.callback(checkpoint.close)
        found.append(checkpoint)
    if not found:
        raise errors[0]
    return found[0]


def _check_fit(
    candidates: Sequence[Candidate], base: Checkpoint | GgufFile, fixture: Fixture, *, tokenizer: str | None
) -> None:
    """Each artifact against base, fixture and memory: dropped if they do not go together, a note where they may not."""
    n_vocab = base.tensors[EMBEDDING].shape[0]
    errors: list[BadInputError] = []
    for one in candidates:
        if one.artifact is None:
            continue
        try:
            _check_one(one.artifact, base.label, n_vocab, fixture)
            memory.require(one.artifact, fixture.chunks(), keep_logits=False)
        except (FixtureError, UnsupportedError) as error:
            one.drop(error)
            errors.append(error)
            continue
        if gguf_tokenizer_sha256(one.artifact.metadata) != tokenizer:
            one.row.notes.append("its tokenizer's keys differ from the first artifact's; it got the same ids")
    if not _left(candidates):
        raise errors[0]


def _check_one(artifact: GgufFile, base: str, n_vocab: int, fixture: Fixture) -> None:
    if artifact.vocab_size != n_vocab:
        raise FixtureError(
            f"{artifact.label} has a vocabulary of {artifact.vocab_size} tokens, {base} one of {n_vocab}"
        )
    n_ctx = artifact.metadata.get(f"{artifact.arch}.context_length")
    if isinstance(n_ctx, int):
        fixture.check_context(n_ctx)
