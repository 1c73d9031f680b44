"""Which way the strict control goes: one F32 file, or slices of layers where that file would be too large.

Where a slice may begin is decided here, as both sides are needed: the reference built from the slice's own metadata
must say of every layer what it says of it in the whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from diffharness.engine import slices
from diffharness.engine.models import OneFile
from diffharness.engine.slices import Slice
from diffharness.engine.slicing import SlicedStrict
from diffharness.engine.strict import write_strict
from diffharness.errors import ArtifactFileError
from diffharness.machine import free_disk, this_machine
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.work import Work
from diffharness.records import StrictWay
from diffharness.reference import archs
from diffharness.reference.steps import Steps
from diffharness.reference.weights import SourceWeights
from diffharness.settings import configs_dir, load_yaml
from diffharness.weights.gguf_file import GgufFile
from diffharness.weights.source import Metadata, WeightSource


class Limit(BaseModel):
    """A number, and why it is that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(gt=0)
    reason: str = Field(min_length=1)


class Limits(BaseModel):
    """configs/strict.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    disk_share: Limit
    memory_share: Limit
    slice_bytes: Limit


@dataclass(frozen=True)
class Chosen:
    """The artifact as F32, in a way, and what the record says of it."""

    model: OneFile | SlicedStrict
    way: StrictWay

    @property
    def path(self) -> Path | None:
        """The whole file, where there is one."""
        return self.model.path if isinstance(self.model, OneFile) else None


@contextmanager
def strict_model(work: Work) -> Iterator[Chosen]:
    """The artifact as F32 for as long as the block lasts. Raises OutputError where the disk has no room."""
    request, artifact = work.request, work.inputs.artifact
    way, parts = choose(artifact, request, work.folder, load_yaml(Limits, configs_dir() / "strict.yaml"))
    if parts:
        request.say(f"the artifact as F32 goes in {len(parts)} slices: {way.reason}")
        yield Chosen(SlicedStrict(artifact, parts, work.folder, request.say), way)
        return
    path = work.folder / "strict.gguf"
    try:
        with work.timings.step("strict file"):
            request.say("writing the artifact as F32")
            write_strict(artifact, artifact, path)
        yield Chosen(OneFile(path), way)
    finally:
        path.unlink(missing_ok=True)


def choose(artifact: GgufFile, request: RunRequest, folder: Path, limits: Limits) -> tuple[StrictWay, list[Slice]]:
    """The way, and the slices where it is that."""
    wish = _wish(slices.f32_bytes(artifact), request, folder, limits)
    if wish is None:
        return StrictWay(way="whole", reason="the artifact as F32 is small enough"), []
    if request.strict == "whole":
        return StrictWay(way="whole", reason=wish), []
    obstacle = slices.obstacle(artifact, request.overrides) or _unknown(artifact.metadata)
    pieces = [] if obstacle else possible_pieces(artifact)
    if len(pieces) > 1:
        parts = slices.plan(artifact, pieces, int(limits.slice_bytes.value), request.slice_layers)
        if all(_same_model(artifact.metadata, part) for part in parts):
            return _told(parts, wish), _turned(artifact, parts)
    why = obstacle or "no cut leaves every layer what it is in the whole model"
    return StrictWay(way="whole", reason=f"{wish}, but {artifact.label} cannot be cut into slices: {why}"), []


def _wish(n_bytes: int, request: RunRequest, folder: Path, limits: Limits) -> str | None:
    """Why the model is to be cut, or not although it is asked about; None where there is nothing to say."""
    if request.strict != "auto":
        return "asked for"
    disk, memory = free_disk(folder), this_machine().memory_bytes
    for have, share, what in (
        (disk, limits.disk_share.value, "free disk"),
        (memory, limits.memory_share.value, "memory"),
    ):
        if n_bytes > share * have > 0:
            return f"as F32 it takes {_gb(n_bytes)}, more than {share:g} of the {_gb(have)} of {what}"
    return None


def _unknown(metadata: Metadata) -> str | None:
    """Why the reference cannot say what the layers are, or None."""
    try:
        archs.build(metadata)
    except ArtifactFileError as error:
        return error.message
    return None


def _told(parts: Sequence[Slice], reason: str) -> StrictWay:
    sizes = [part.n_layer for part in parts if part.is_new]
    return StrictWay(
        way="slices", reason=reason, slices=len(sizes), layers=max(sizes), heads=sum(p.rows is not None for p in parts)
    )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


# -- where a slice may begin --------------------------------------------------------------------------


def possible_pieces(source: WeightSource) -> list[tuple[int, int]]:
    """The shortest runs of layers that can be slices, from the first layer to the last; one only if there is no cut."""
    n_layer, kinds = slices.layer_count(source.metadata), _needed_kinds(source)

    def is_piece(first: int, stop: int) -> bool:
        return all(any(il in of_kind for il in range(first, stop)) for of_kind in kinds) and slices.can_run(
            source, first, stop
        )

    bounds = [0]
    for at in range(1, n_layer):
        if is_piece(bounds[-1], at) and is_piece(at, n_layer) and _same_model(source.metadata, Slice(at, n_layer)):
            bounds.append(at)
    return list(zip(bounds, [*bounds[1:], n_layer], strict=True))


def _needed_kinds(source: WeightSource) -> list[set[int]]:
    """The layers of each kind of which every slice needs one: llama.cpp makes a cache, or an input, for each kind.

    Beside layers that slide it can do without the others, whose cache and inputs then stay empty.
    """
    model = archs.build(source.metadata)
    kinds: dict[str, set[int]] = {}
    for il in range(model.n_layer):
        kinds.setdefault(model.layer_kind(il), set()).add(il)
    if kinds.keys() == {"sliding", "global"}:
        del kinds["global"]
    return list(kinds.values())


def _same_model(metadata: Metadata, part: Slice) -> bool:
    """Whether the reference, built from the slice's metadata, says of every layer what it says in the whole."""
    whole = archs.build(metadata)
    try:
        cut = archs.build({**metadata, **slices.cut(metadata, part.first, part.stop)})
        return _same_fields(whole, cut, part) and all(
            _same_layer(_of_layer(whole, part.first + il), _of_layer(cut, il), part.first) for il in range(part.n_layer)
        )
    except ArtifactFileError:
        return False


def _of_layer(model: Steps, il: int) -> dict[str, Any]:
    """Everything that a model says of a layer by its number alone: its kind, how it turns heads, how it scores."""
    said = {}
    for name, method in inspect.getmembers(type(model), inspect.isfunction):
        if list(inspect.signature(method).parameters) == ["self", "il"]:
            said[name] = getattr(model, name)(il)
    return said


def _same_layer(whole: Mapping[str, Any], cut: Mapping[str, Any], first: int) -> bool:
    """Whether the same is said, where what is said may be a layer's number."""
    return all(
        value == cut[name] or (type(value) is int and type(cut[name]) is int and value == cut[name] + first)
        for name, value in whole.items()
    )


def _same_fields(whole: Steps, cut: Steps, part: Slice) -> bool:
    """Whether the two models' numbers are the same, where they count layers from another first one on."""
    if type(whole) is not type(cut) or not is_dataclass(whole):
        return False
    for each in fields(whole):
        a, b = getattr(whole, each.name), getattr(cut, each.name)
        if a == b or each.name == "n_layer":
            continue
        if isinstance(a, tuple) and len(a) == whole.n_layer and a[part.first : part.stop] == b:
            continue
        # a number of leading layers
        if type(a) is int and b == min(max(a - part.first, 0), part.n_layer):
            continue
        return False
    return True


def _turned(source: WeightSource, parts: Sequence[Slice]) -> list[Slice]:
    """The slices, with whether any of their layers reads the rope factors that the file has."""
    if not slices.ROPE_FACTORS & set(source.tensors):
        return list(parts)
    model, weights = archs.build(source.metadata), SourceWeights(source)
    reads = [model.rope_factors(weights, il) is not None for il in range(model.n_layer)]
    weights.close()
    if not any(reads):  # the architecture reads them in another step
        return list(parts)
    return [replace(part, is_turned=any(reads[part.first : part.stop])) for part in parts]
