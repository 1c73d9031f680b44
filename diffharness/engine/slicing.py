"""The strict engine in slices of layers: each written, run and deleted, its captures joined to one.

Every slice is fed with the engine's own output of the slice before, so that what is captured, logits included, is what
the engine computes from the tokens on, as if its F32 file were whole; the files never are on disk together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np

from diffharness.captures import Capture, CaptureWriter
from diffharness.engine import slices
from diffharness.engine.models import Chunks, How
from diffharness.engine.nodes import is_wanted
from diffharness.engine.runner import Engine, EngineCrash, EngineRun, States
from diffharness.engine.slice_file import write_slice
from diffharness.engine.slices import Slice, overrides_for
from diffharness.errors import FixtureError, InconclusiveError
from diffharness.settings import EngineSettings
from diffharness.taps import BEFORE_LAYERS, layer_tap, split
from diffharness.weights.gguf_file import GgufFile
from diffharness.weights.output import check_space
from diffharness.weights.source import EMBEDDING, IntArray

_BLOCK_BYTES = 32 << 20  # of values that are copied at once
_LOGITS = "logits"

Say = Callable[[str], None]


class SlicedStrict:
    """An artifact as F32, `parts` of it at a time, in files under `folder`."""

    def __init__(self, artifact: GgufFile, parts: Sequence[Slice], folder: Path, say: Say = lambda text: None) -> None:
        self.artifact, self.parts, self.folder, self._say = artifact, list(parts), folder, say

    def capture(
        self,
        settings: EngineSettings,
        chunks: Chunks,
        out: str | os.PathLike[str],
        *,
        taps: Sequence[str] | None = None,
        overrides: Sequence[str] = (),
        meta: Mapping[str, str] | None = None,
        trace: bool = False,
    ) -> EngineRun:
        """As `Engine.capture` of the whole. `trace` names the node in which a slice dies, and captures nothing."""
        out, states = Path(out), None
        heads: list[Path] = []  # captures of parts of the vocabulary
        runs: list[EngineRun] = []
        with contextlib.ExitStack() as stack:
            writer = None if trace else stack.enter_context(CaptureWriter(out, sum(map(len, chunks)), meta))
            for number, part in enumerate(self.parts):
                path = out.with_name(f"{out.name}.slice-{number}")
                stack.callback(path.unlink, missing_ok=True)
                self._say(f"engine: {described(part)}, part {number + 1} of {len(self.parts)}")
                wanted = _wanted(part, [] if trace or not part.is_new else taps)
                one = OneSlice(self, part, states)
                try:
                    runs.append(one.capture(settings, chunks, path, taps=wanted, overrides=overrides))
                except EngineCrash as crash:
                    if trace:
                        one.capture(settings, chunks, path, overrides=overrides, trace=True)
                    if crash.is_unusable:
                        crash.message += f" ({described(part)} by themselves; --strict whole asks for one file)"
                    raise
                if number == 0:  # the other slices' taps are as large: tell now that they will not fit
                    check_space(out.parent, path.stat().st_size * (self.parts[-1].stop - part.stop) // part.n_layer)
                if writer is not None and part.is_new:
                    _copy(Capture(path), writer, part, taps)
                if part.rows is not None:
                    heads.append(path)
                    continue
                if states is not None:
                    states.capture.unlink()
                states = self._states(path, part.stop)
            if writer is not None:
                _join(heads, writer)
        return _as_one(runs, out, taps, writer)

    def holding(self, layers: Collection[int | None]) -> list[Slice]:
        """The slices that hold one of `layers`; None stands for the head."""
        return [
            part
            for part in self.parts
            if part.is_new
            and ((part.rows is not None and None in layers) or any(il in layers for il in range(part.first, part.stop)))
        ]

    def alone(self, part: Slice, capture: Path) -> OneSlice:
        """One slice, fed from a capture of the whole."""
        return OneSlice(self, part, self.states_before(part, capture))

    def states_before(self, part: Slice, capture: Path) -> States | None:
        """What a slice is fed with, from a capture of the whole; None of the first, which takes tokens."""
        return self._states(capture, part.first) if part.first else None

    def _states(self, capture: Path, layer: int) -> States:
        tap = layer_tap(layer - 1, "layer_out")
        if tap not in Capture(capture):
            raise InconclusiveError(
                f"the engine's graph has no node that is known as {tap}, which feeds the next slice",
                hint="run the F32 model as one file",
            )
        return States(capture, tap, slices.input_factor(self.artifact.metadata))

    @contextlib.contextmanager
    def file(self, part: Slice, chunks: Chunks) -> Iterator[tuple[Path, Chunks]]:
        """One slice's file for the time of the block, and the chunks in its own vocabulary."""
        tokens, local = _own_vocabulary(chunks, self.artifact.tensors[EMBEDDING].shape[0])
        path = self.folder / f"strict-{part.first}-{part.stop}.gguf"
        try:
            write_slice(self.artifact, self.artifact, path, part, tokens)
            yield path, local
        finally:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class OneSlice:
    """A slice by itself. Its logits are over the rows that it has in the vocabulary's place."""

    of: SlicedStrict
    part: Slice
    states: States | None  # None of the first, which takes tokens

    def capture(
        self,
        settings: EngineSettings,
        chunks: Chunks,
        out: str | os.PathLike[str],
        **how: Unpack[How],
    ) -> EngineRun:
        """As `Engine.capture`; layers have the numbers that they have in the whole."""
        how["overrides"] = overrides_for(self.part, self.of.artifact.arch, how.get("overrides", ()))
        with self.of.file(self.part, chunks) as (model, local):
            return Engine(settings).capture(model, local, out, states=self.states, first_layer=self.part.first, **how)


def described(part: Slice) -> str:
    """`layers 0-5`, with the part of the head that goes with them."""
    layers = f"layer {part.first}" if part.n_layer == 1 else f"layers {part.first}-{part.stop - 1}"
    return layers if part.rows is None else f"{layers} and {part.rows.stop - part.rows.start} rows of the head"


def _wanted(part: Slice, taps: Sequence[str] | None) -> list[str] | None:
    """The taps that are asked for, and what feeds the next slice."""
    if taps is None or part.rows is not None:
        return None if taps is None else list(taps)
    return [*taps, layer_tap(part.stop - 1, "layer_out")]


def _own_vocabulary(chunks: Chunks, n_vocab: int) -> tuple[IntArray, list[IntArray]]:
    """The ids that the text uses, ascending, and the text in their numbers. Raises FixtureError."""
    ids = [np.asarray(chunk, dtype=np.int64) for chunk in chunks]
    tokens = np.unique(np.concatenate(ids))
    outside = tokens[(tokens < 0) | (tokens >= n_vocab)]
    if len(outside):
        raise FixtureError(f"token {outside[0]} is outside of the engine's vocabulary of {n_vocab}")
    return tokens, [np.searchsorted(tokens, chunk) for chunk in ids]


# -- joining ------------------------------------------------------------------------------------------


def _copy(capture: Capture, writer: CaptureWriter, part: Slice, taps: Sequence[str] | None) -> None:
    """A slice's taps, without those that its being a slice makes: an embedding or an end that the whole has not."""
    for tap in capture.taps:
        layer, name = split(tap)
        outside = layer is None and (part.first > 0 if name in BEFORE_LAYERS else part.rows is None)
        if tap == _LOGITS or outside or not is_wanted(tap, taps):
            continue
        values = capture.read(tap)
        for rows in _blocks(len(values), values.shape[1]):
            writer.write(tap, rows.start, values[rows])


def _join(paths: Sequence[Path], writer: CaptureWriter) -> None:
    """Logits of all parts of the vocabulary, side by side."""
    parts = [Capture(path).read(_LOGITS) for path in paths]
    width = sum(part.shape[1] for part in parts)
    for rows in _blocks(len(parts[0]), width):
        writer.write(_LOGITS, rows.start, np.concatenate([part[rows] for part in parts], axis=1))


def _blocks(n_rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (4 * max(1, width)))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def _as_one(
    runs: Sequence[EngineRun], out: Path, taps: Sequence[str] | None, writer: CaptureWriter | None
) -> EngineRun:
    """What the slices took together; nodes are those of all of their graphs."""
    found = writer.taps if writer is not None else []
    return replace(
        runs[0],
        capture=out if writer is not None else None,
        taps=found,
        missing=[want for want in taps or () if not any(is_wanted(tap, [want]) for tap in found)],
        n_nodes=sum(run.n_nodes for run in runs),
        load_s=sum(run.load_s for run in runs),
        eval_s=sum(run.eval_s for run in runs),
        log=[line for run in runs for line in run.log],
    )
