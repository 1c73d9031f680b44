"""Attention health, wired: the reference's attention weights are watched while it runs, on their own or beside others.

Whatever passes are made anyway carry it along: give a `Watching` as their `on_attention`, and what was watched to
`judged`. A `Baseline` makes the passes itself, without the output head; of the checkpoint's only the layer inputs are
kept, on disk.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Self

from torch import Tensor

from diffharness.fixture import Fixture
from diffharness.forensics.attention import AttentionMeter, AttentionStats
from diffharness.forensics.attention_changes import Streams, compare
from diffharness.layers import buckets
from diffharness.legs.graph import GraphShape
from diffharness.pipeline.reference_runs import Precision, captured, layer_inputs, shape_of
from diffharness.records.attention import AttentionHealth
from diffharness.reference.runner import Reference
from diffharness.settings import Floors
from diffharness.weights.source import WeightSource

_DOUBLING = 1024  # from here on ranges of positions double, where `buckets` takes steps of four


class Watching:
    """An `on_attention` for one pass of `Reference.run`; afterwards its statistics."""

    def __init__(self, shape: GraphShape) -> None:
        ranges = ranges_of(shape)
        self._own, self._local = AttentionMeter(ranges), AttentionMeter(ranges)

    def __call__(
        self, layer: int, own: Tensor, local: Tensor | None, hidden: Tensor, first_query: int, first_key: int
    ) -> None:
        self._own.see(layer, own, hidden, first_query, first_key)
        if local is not None:
            self._local.see(layer, local, hidden, first_query, first_key)

    @property
    def own(self) -> AttentionStats:
        """The model by itself."""
        return self._own.stats()

    @property
    def streams(self) -> Streams:
        """Both streams of a pass that was fed the checkpoint's layer inputs."""
        return Streams(self._own.stats(), self._local.stats())


def ranges_of(shape: GraphShape) -> list[tuple[int, int]]:
    """Ranges [start, stop) of positions in a chunk, cut at the window and n_ubatch, without position 0."""
    length = int(shape.positions.max()) + 1
    doubling = [_DOUBLING << i for i in range(length.bit_length())]
    return [(start, stop) for start, stop in buckets(length, [*shape.landmarks.values(), *doubling]) if start > 0]


def judged(
    checkpoint: Watching, artifact: Watching, control: Watching | None, shape: GraphShape, floors: Floors
) -> AttentionHealth:
    """What the watched passes on checkpoint, artifact and control say against each other."""
    return compare(
        checkpoint.own,
        artifact.streams,
        None if control is None else control.streams,
        shape.kinds,
        shape.landmarks,
        floors,
    )


class Baseline:
    """The checkpoint's own pass, to judge any number of artifacts by; its layer inputs lie on disk until `close`."""

    def __init__(self, checkpoint: WeightSource, fixture: Fixture, precision: Precision, *, n_ubatch: int) -> None:
        self._fixture, self._precision = fixture, precision
        self.shape = shape_of(Reference(checkpoint).model, fixture, n_ubatch)
        self._watched = Watching(self.shape)
        self._folder = tempfile.TemporaryDirectory(prefix="diffharness-")
        path = Path(self._folder.name) / "layer-inputs.safetensors"
        try:
            self._capture = captured(
                checkpoint, fixture, precision, path, taps=("token_embd", "layer_out"), on_attention=self._watched
            )
        except BaseException:
            self._folder.cleanup()
            raise

    def close(self) -> None:
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def beside(self, source: WeightSource) -> Watching:
        """A pass on another source: by itself, and with the checkpoint's layer inputs beside."""
        watching = Watching(self.shape)
        reference = Reference(source, dtype=self._precision.dtype, device=self._precision.device)
        inputs = layer_inputs(self._capture)
        reference.run(self._fixture.chunks(), engine_inputs=inputs, keep_logits=False, on_attention=watching)
        return watching

    def judge(self, artifact: Watching, control: Watching | None, floors: Floors) -> AttentionHealth:
        return judged(self._watched, artifact, control, self.shape, floors)
