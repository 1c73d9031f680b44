"""The way that the strict control goes, by what disk and memory there are and by what is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffharness.engine.slices import Slice, f32_bytes
from diffharness.machine import Machine, this_machine
from diffharness.pipeline import strict_way
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.strict_way import Limits, choose, possible_pieces
from diffharness.records import StrictWay
from diffharness.reference import archs
from diffharness.settings import configs_dir, data_dir, load_engine, load_tolerances, load_yaml
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.names._map import Sizes
from diffharness.weights.synth import SynthSource

LIMITS = load_yaml(Limits, configs_dir() / "strict.yaml")
MODEL = data_dir("fixtures") / "tiny-gemma4" / "tiny-gemma4-Q4_K_M.gguf"


@pytest.fixture
def artifact() -> Iterator[GgufFile]:
    with open_gguf(MODEL) as opened:
        yield opened


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, artifact: GgufFile) -> Any:
    """Sets free disk and memory, in multiples of the artifact as F32."""

    def has(disk: float, memory: float) -> None:
        size = f32_bytes(artifact)
        found: Machine = replace(this_machine(), memory_bytes=int(memory * size))
        monkeypatch.setattr(strict_way, "free_disk", lambda folder: int(disk * size))
        monkeypatch.setattr(strict_way, "this_machine", lambda: found)

    return has


def chosen(artifact: GgufFile, folder: Path, **changes: Any) -> tuple[StrictWay, list[Slice]]:
    request = RunRequest(MODEL, load_engine("native"), load_tolerances(), **changes)
    return choose(artifact, request, folder, LIMITS)


@pytest.mark.parametrize(
    ("disk", "memory", "way", "reason"),
    [
        (2.1, 2.1, "whole", "small enough"),
        (1.9, 2.1, "slices", "free disk"),
        (2.1, 1.9, "slices", "memory"),
        (2.1, 0.0, "whole", "small enough"),  # a system that does not tell
    ],
)
def test_by_itself(
    artifact: GgufFile, machine: Any, tmp_path: Path, disk: float, memory: float, way: str, reason: str
) -> None:
    machine(disk, memory)
    found, parts = chosen(artifact, tmp_path)
    assert found.way == way and reason in found.reason
    assert bool(parts) == (way == "slices")


def test_asked_for(artifact: GgufFile, machine: Any, tmp_path: Path) -> None:
    machine(0.1, 0.1)
    assert chosen(artifact, tmp_path, strict="whole") == (StrictWay(way="whole", reason="asked for"), [])
    machine(100, 100)
    found, parts = chosen(artifact, tmp_path, strict="slices", slice_layers=4)
    assert (found.way, found.slices, found.layers, found.heads) == ("slices", 3, 4, 1)
    assert [(part.first, part.stop) for part in parts] == [(0, 4), (4, 8), (8, 12)]
    assert [part.is_turned for part in parts] == [False, True, True], "only globals (5, 11) read the rope factors"


def test_pieces_are_as_short_as_the_engine_allows(artifact: GgufFile) -> None:
    assert possible_pieces(artifact) == [(il, il + 2) for il in range(0, 12, 2)]


@pytest.mark.parametrize(
    ("kinds", "starts"),
    [
        (["sliding", "global"], [0, 1]),  # a slice may lack what does not slide, but not what does
        (["chunked", "global"], [0, 2]),
        (["sliding", "global", "sliding", "sliding"], [0, 1, 3, 4, 5, 7]),
        (["chunked", "global", "chunked", "chunked"], [0, 2]),
        (["recurrent", "global", "global", "global"], [0, 2]),
        (["global"], [0, 1, 2, 3]),
    ],
)
def test_a_slice_has_a_layer_of_each_kind_that_the_engine_needs(
    monkeypatch: pytest.MonkeyPatch, kinds: list[str], starts: list[int]
) -> None:
    n_layer = 8 if len(kinds) == 4 else 4
    source = SynthSource("llama", Sizes(n_layer=n_layer))
    monkeypatch.setattr(type(archs.build(source.metadata)), "layer_kind", lambda self, il: kinds[il % len(kinds)])
    monkeypatch.setattr(strict_way, "_same_model", lambda metadata, part: True)
    assert possible_pieces(source) == list(zip(starts, [*starts[1:], n_layer], strict=True))


def test_an_architecture_without_a_reference(
    artifact: GgufFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(archs.BUILD, "gemma4")
    found, parts = chosen(artifact, tmp_path, strict="slices")
    assert (found.way, parts) == ("whole", []) and "cannot be cut" in found.reason
