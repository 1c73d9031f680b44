"""Runs that end before their legs: what is known by then, as a record."""

from __future__ import annotations

from diffharness import verdict
from diffharness.engine.runner import EngineCrash
from diffharness.errors import ArtifactFileError, BadInputError, InconclusiveError
from diffharness.forensics.metadata import differences
from diffharness.pipeline.crashes import crash_finding
from diffharness.pipeline.request import RunRequest
from diffharness.records import ArtifactLeg, ArtifactSubject, Finding, Legs, MetadataRow, RunRecord, Subject
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import open_gguf


def no_model(request: RunRequest, error: ArtifactFileError) -> RunRecord:
    """An artifact that makes no model: `artifact.metadata` if the checkpoint knows the key, else `artifact.file`."""
    rows = _differing_keys(request)
    if rows:
        keys = "; ".join(f"{row.key} is {row.artifact}, by the checkpoint's config {row.checkpoint}" for row in rows)
        finding = Finding(
            kind="artifact.metadata",
            leg="artifact",
            message=f"{error.message}; metadata that the forward reads differs from the checkpoint: {keys}",
            evidence={"keys": [row.model_dump() for row in rows]},
        )
        return _record(request, finding, Legs(artifact=ArtifactLeg(status="fail", reason=error.message, metadata=rows)))
    hint = error.hint or "correct the metadata, or convert the file again"
    evidence = {"offset": error.offset, "tensor": error.tensor, "hint": hint}
    # What is said of a metadata key comes from where the file's name is not known.
    name = request.model.name
    message = error.message if name in error.message else f"{name}: {error.message}"
    return _record(request, Finding(kind="artifact.file", leg=None, message=message, evidence=evidence))


def no_tokens(request: RunRequest, crash: EngineCrash) -> RunRecord:
    """The engine died over the text, and nothing else could make tokens of it."""
    finding = crash_finding("tokenizing", crash)
    finding.next_step = "make a fixture elsewhere with `diffharness fixture new`, and give it with --fixture"
    return _record(request, finding)


def nothing_compared(request: RunRequest, error: InconclusiveError) -> RunRecord:
    """Something kept the legs from comparing anything."""
    return _record(request, Finding(kind="inconclusive", leg=None, message=error.message, next_step=error.hint))


def _differing_keys(request: RunRequest) -> list[MetadataRow]:
    """Keys without which, or with which, the artifact makes no model, while the checkpoint's values do."""
    if request.checkpoint is None:
        return []
    try:
        with open_gguf(request.model) as artifact:
            checkpoint = Checkpoint(request.checkpoint)
            if checkpoint.arch != artifact.arch:
                return []
            rows = differences(artifact.metadata, checkpoint.metadata, artifact.arch)
    except BadInputError:
        return []
    return [row for row in rows if row.used]


def _record(request: RunRequest, finding: Finding, legs: Legs | None = None) -> RunRecord:
    legs = legs or Legs()
    return RunRecord(
        verdict=verdict.decide([finding], legs, model=str(request.model)),
        legs=legs,
        findings=[finding],
        subject=Subject(artifact=ArtifactSubject(path=str(request.model))),
        repro=request.repro,
    )
