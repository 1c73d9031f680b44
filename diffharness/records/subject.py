"""What was under test: artifact, checkpoint, fixture, engine and machine."""

from __future__ import annotations

from pydantic import Field

from diffharness.records.base import Part, PlainDict


class ArtifactSubject(Part):
    path: str
    sha256: str | None = None
    arch: str | None = None
    name: str | None = None
    types: dict[str, int] = Field(default={}, description="tensors by type")
    n_tensors: int | None = None
    n_params: int | None = None
    n_bytes: int | None = None


class CheckpointSubject(Part):
    path: str
    sha256: str | None = None
    arch: str | None = None
    model_type: str | None = None
    types: dict[str, int] = {}
    ignored: list[str] = []


class FixtureSubject(Part):
    name: str
    n_tokens: int
    n_scored: int
    chunk: int | None = None
    sha256: str | None = Field(default=None, description="of the ids")
    text_sha256: str | None = None
    provenance: str | None = None


class EngineSubject(Part):
    version: str | None = None
    bindings: str | None = Field(default=None, description="the Python package and its version")
    commit: str | None = None
    settings: PlainDict = {}
    overrides: list[str] = []
    system_info: str | None = None


class Subject(Part):
    """What was under test, and on what machine."""

    artifact: ArtifactSubject
    checkpoint: CheckpointSubject | None = None
    fixture: FixtureSubject | None = None
    engine: EngineSubject | None = None
    machine: PlainDict = {}
