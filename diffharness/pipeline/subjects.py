"""What a record says of its inputs: artifact, checkpoint, fixture, engine, machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffharness import __version__
from diffharness.fixture import Fixture
from diffharness.machine import this_machine
from diffharness.records import ArtifactSubject, CheckpointSubject, EngineSubject, FixtureSubject
from diffharness.settings import EngineSettings
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import GgufFile


def artifact_subject(path: Path, artifact: GgufFile, *, hashed: bool = True) -> ArtifactSubject:
    """The artifact; with the hash of its bytes, which reads them all, unless it is not `hashed`."""
    name = artifact.metadata.get("general.name")
    return ArtifactSubject(
        path=str(path),
        sha256=artifact.sha256() if hashed else None,
        arch=artifact.arch,
        name=name if isinstance(name, str) else None,
        types=artifact.types,
        n_tensors=len(artifact.tensors),
        n_params=sum(info.n_elements for info in artifact.tensors.values()),
        n_bytes=artifact.n_bytes,
    )


def checkpoint_subject(path: Path, checkpoint: Checkpoint, *, hashed: bool = True) -> CheckpointSubject:
    """The checkpoint; with the hash of its files, which reads them all, unless it is not `hashed`."""
    return CheckpointSubject(
        path=str(path),
        sha256=checkpoint.sha256() if hashed else None,
        arch=checkpoint.arch,
        model_type=checkpoint.config.get("model_type"),
        types=dict(Counter(info.type for info in checkpoint.tensors.values())),
        ignored=[*checkpoint.ignored, *checkpoint.extra],
    )


def fixture_subject(fixture: Fixture) -> FixtureSubject:
    """The fixture."""
    return FixtureSubject(
        name=fixture.name,
        n_tokens=fixture.n_tokens,
        n_scored=int(fixture.scored_positions().size),
        chunk=fixture.chunk,
        sha256=fixture.ids_sha256,
        text_sha256=fixture.text_sha256,
        provenance=", ".join(f"{key}: {value}" for key, value in fixture.provenance.items()) or None,
    )


def engine_subject(settings: EngineSettings, info: Mapping[str, Any], overrides: Sequence[str]) -> EngineSubject:
    """The engine, by its settings and what it said of itself when it ran: `EngineRun.info`, or nothing."""
    return EngineSubject(
        version=info.get("version"),
        bindings=info.get("bindings"),
        commit=info.get("commit"),
        settings=settings.model_dump(mode="json"),
        overrides=list(overrides),
        system_info=info.get("system_info"),
    )


def machine_subject() -> dict[str, Any]:
    """This machine, and the version of this program."""
    return {**this_machine().as_dict(), "diffharness": __version__}
