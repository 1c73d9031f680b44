"""Wrong engines for `explain`: the real one on a changed copy of the model that only it sees, or on other ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffharness.captures import Capture, CaptureWriter
from diffharness.engine.runner import Engine
from diffharness.engine.strict import strict_settings, write_strict
from diffharness.fixture import Fixture, load_fixture
from diffharness.pipeline.explaining import of_runs
from diffharness.pipeline.reference_runs import Precision, against_engine
from diffharness.records.explain import Explanation
from diffharness.settings import load_engine, load_tolerances
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.gguf_write import rewrite_gguf
from diffharness.weights.source import Float32Array, IntArray, TensorInfo
from tests.e2e.conftest import Pair

SETTINGS = strict_settings(load_engine("native").changed(threads=1))
TOLERANCES = load_tolerances()
FLOORS = {name: TOLERANCES[name] for name in TOLERANCES.floors}

Values = Callable[[str, Float32Array], Float32Array]  # name and value of a tensor, to what the engine is given


@dataclass(frozen=True)
class Wrong:
    """What the engine is given otherwise than the reference."""

    overrides: tuple[str, ...] = ()
    values: Values = lambda name, value: value
    names: Callable[[str], str | None] = lambda name: name  # None: the engine's file lacks it
    more: Callable[[GgufFile], Mapping[str, Float32Array]] = lambda source: {}  # tensors that the file does not have
    kv: Mapping[str, Any] = field(default_factory=dict)
    arch: str | None = None  # the same keys under another architecture
    ids: Callable[[list[int]], list[int]] = lambda ids: ids
    drop_rows: int = 0  # that the engine's chunks have at their start, beyond the fixture's


class Changed:
    """A file's tensors as `wrong` has them, in memory."""

    def __init__(self, source: GgufFile, wrong: Wrong) -> None:
        self.label, self.arch, self.metadata = source.label, source.arch, source.metadata
        kept = {new: old for old in source.tensors if (new := wrong.names(old)) is not None}
        self._values = {new: wrong.values(new, source.read(old)) for new, old in kept.items()}
        self._values |= wrong.more(source)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, value.shape, "F32", value.nbytes) for name, value in self._values.items()}

    def read(self, name: str) -> Float32Array:
        return np.ascontiguousarray(self._values[name], dtype=np.float32)

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self.read(name)[rows]


def wrong_capture(pair: Pair, wrong: Wrong, folder: Path, fixture: Fixture) -> Capture:
    """The strict engine's capture of what it is given."""
    copy, strict = folder / "copy.gguf", folder / "strict.gguf"
    with open_gguf(pair.gguf) as source:
        kv = dict(wrong.kv)
        if wrong.arch is not None:
            old = f"{source.arch}."
            for key, value in source.metadata.items():
                if key.startswith(old):
                    kv[key] = None
                    kv.setdefault(f"{wrong.arch}.{key.removeprefix(old)}", value)
            kv["general.architecture"] = wrong.arch
        rewrite_gguf(source, copy, kv=kv)
        with open_gguf(copy) as renamed:
            write_strict(Changed(source, wrong), renamed, strict)
    chunks = [wrong.ids(list(map(int, chunk))) for chunk in fixture.chunks()]
    run = Engine(SETTINGS).capture(strict, chunks, folder / "engine.safetensors", overrides=wrong.overrides)
    capture = run.open()
    return _without_rows(capture, chunks, wrong.drop_rows, folder / "cut.safetensors") if wrong.drop_rows else capture


def _without_rows(capture: Capture, chunks: Sequence[list[int]], n: int, path: Path) -> Capture:
    keep = np.concatenate([np.arange(len(chunk)) >= n for chunk in chunks])
    with CaptureWriter(path, int(keep.sum())) as writer:
        for tap in capture.taps:
            writer.write(tap, 0, capture.read(tap)[keep])
    return Capture(path)


def explained(pair: Pair, capture: Capture, fixture: Fixture, **more: Any) -> Explanation | None:
    """What `explain` says of a capture; None where nothing fails."""
    with open_gguf(pair.gguf) as source:
        runs = against_engine(source, capture, fixture, FLOORS, precision=Precision(), n_ubatch=SETTINGS.n_ubatch)
        return of_runs(
            source, capture, fixture, runs, FLOORS, precision=Precision(), n_ubatch=SETTINGS.n_ubatch, **more
        )


def explain_wrong(pair: Pair, wrong: Wrong, folder: Path) -> Explanation | None:
    """The whole way from a wrong engine to its explanation."""
    fixture = load_fixture(pair.fixture)
    return explained(pair, wrong_capture(pair, wrong, folder, fixture), fixture)
