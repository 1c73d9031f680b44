"""Sources made of two: an artifact with some of the checkpoint's tensors, or all of them a part of the way to it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffharness.weights.source import (
    EMBEDDING,
    HEAD,
    Float32Array,
    IntArray,
    Metadata,
    Overlay,
    TensorInfo,
    WeightSource,
)


class Exchanged(Overlay):
    """`base` with the tensors `names` as `top` has them: those that it does not have are gone."""

    def __init__(self, base: WeightSource, top: WeightSource, names: frozenset[str], metadata: Metadata) -> None:
        super().__init__(base, top, names.__contains__, metadata)
        self.tensors = {name: info for name, info in self.tensors.items() if name in top.tensors or name not in names}


class Untied:
    """A source whose tied head has a name of its own, as the other side's has."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        info = source.tensors[EMBEDDING]
        self.label, self.arch, self.metadata = source.label, source.arch, source.metadata
        self.tensors: Mapping[str, TensorInfo] = {
            **source.tensors,
            HEAD: TensorInfo(HEAD, info.shape, info.type, info.n_bytes),
        }

    def read(self, name: str) -> Float32Array:
        return self._source.read(EMBEDDING if name == HEAD else name)

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self._source.take(EMBEDDING if name == HEAD else name, rows)


def untied(artifact: WeightSource, checkpoint: WeightSource) -> tuple[WeightSource, WeightSource]:
    """Both sides with a head of their own if either has one."""
    if (HEAD in artifact.tensors) == (HEAD in checkpoint.tensors):
        return artifact, checkpoint
    return (artifact, Untied(checkpoint)) if HEAD in artifact.tensors else (Untied(artifact), checkpoint)


class Blend:
    """The checkpoint, moved towards the artifact by `share` of the way; tensors that only one has stay as they are."""

    def __init__(self, artifact: WeightSource, checkpoint: WeightSource, share: float) -> None:
        self._artifact, self._checkpoint, self._share = artifact, checkpoint, np.float32(share)
        self.label = f"{checkpoint.label} moved towards {artifact.label}"
        self.arch, self.metadata, self.tensors = artifact.arch, artifact.metadata, artifact.tensors

    def read(self, name: str) -> Float32Array:
        ours = self._artifact.read(name)
        return ours if name not in self._checkpoint.tensors else self._between(ours, self._checkpoint.read(name))

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        ours = self._artifact.take(name, rows)
        if name not in self._checkpoint.tensors:
            return ours
        return self._between(ours, self._checkpoint.take(name, rows))

    def _between(self, ours: Float32Array, theirs: Float32Array) -> Float32Array:
        return np.asarray(theirs + self._share * (ours - theirs))
