"""Which metadata keys differ between artifact and checkpoint, and which of those the forward reads.

A key that one side leaves out is no difference if its documented default says the same. So each
difference is tried: a key is used if the model that the metadata describe becomes another one (other
hyperparameters) when the artifact's value is exchanged for the checkpoint's, or when among all of the
checkpoint's values only this one stays the artifact's (a factor means nothing before its kind is
right). Values are compared as GGUF stores them, floats in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffharness.errors import ArtifactFileError
from diffharness.records import MetadataRow
from diffharness.reference import archs
from diffharness.weights.source import Metadata


def differences(
    artifact: Metadata, checkpoint: Metadata, arch: str, *, n_tokens: int | None = None
) -> list[MetadataRow]:
    """Every hyperparameter (`<arch>.*`) that differs; keys that only one side spells out count where they matter.

    `n_tokens` is the longest chunk that is run: a window that reaches further is none (the converter
    drops Mistral's, which matters to texts that are longer than it).
    """
    keys = sorted(k for k in {*artifact, *checkpoint} if k.startswith(f"{arch}."))
    differing = {k: checkpoint.get(k) for k in keys if not _same(artifact.get(k), checkpoint.get(k))}
    everything = repaired(artifact, differing)

    def model(metadata: Metadata) -> object:
        return _within(_model(metadata), n_tokens)

    before, after = model(artifact), model(everything)
    rows = []
    for key, theirs in differing.items():
        ours = artifact.get(key)
        alone = model(repaired(artifact, {key: theirs})) != before
        used = alone or model(repaired(everything, {key: ours})) != after
        if used or (ours is not None and theirs is not None):
            rows.append(MetadataRow(key=key, artifact=ours, checkpoint=theirs, used=used))
    return rows


def repaired(metadata: Metadata, values: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata` with some keys replaced; None removes a key."""
    changed = {**metadata, **values}
    return {key: value for key, value in changed.items() if value is not None}


def _model(metadata: Metadata) -> object:
    """The model that the metadata describe; None where a key is missing without which there is no model."""
    try:
        return archs.build(metadata)
    except ArtifactFileError:
        return None


def _within(model: Any, n_tokens: int | None) -> object:
    """The model as texts of `n_tokens` see it."""
    windows = getattr(model, "window", None)
    if n_tokens is None or not isinstance(windows, tuple):
        return model
    reached = tuple(None if window is None or window >= n_tokens else window for window in windows)
    return dataclasses.replace(model, window=reached)


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    x, y = np.atleast_1d(np.asarray(a)), np.atleast_1d(np.asarray(b))
    if x.size != y.size and 1 in (x.size, y.size):  # one value for all layers, or the same spelled out
        x, y = np.broadcast_arrays(x, y)
    return x.shape == y.shape and bool((x.astype(np.float32) == y.astype(np.float32)).all())
