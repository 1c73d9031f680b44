"""Which metadata keys differ between artifact and checkpoint, and which of those the forward reads.

A key that one side leaves out is no difference if its documented default says the same. So each
difference is tried: a key is used if the model that the metadata describe becomes another one (other
hyperparameters) when the artifact's value is exchanged for the checkpoint's, or when among all of the
checkpoint's values only this one stays the artifact's (a factor means nothing before its kind is
right). Values are compared as GGUF stores them, floats in float32.

`account` lists more: special tokens, and hyperparameters of the artifact that the reference never looks at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
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


def account(
    artifact: Metadata, checkpoint: Metadata, arch: str, *, special: Mapping[str, Collection[int]] | None = None
) -> list[MetadataRow]:
    """Everything to be said of the artifact's metadata: `differences`, special tokens, keys that nothing reads.

    `special` are the ids that the checkpoint's files give for each of `tokenizer.ggml.*_token_id`; a model may
    have several, of which GGUF keeps one.
    """
    rows = differences(artifact, checkpoint, arch)
    rows += _special_tokens(artifact, special or {})
    listed = {row.key for row in rows}
    for key in unread(artifact, arch):
        if key not in listed and key not in checkpoint:
            rows.append(MetadataRow(key=key, artifact=artifact[key], used=False, note="nothing reads it"))
    return rows


def _special_tokens(artifact: Metadata, special: Mapping[str, Collection[int]]) -> list[MetadataRow]:
    rows = []
    for key, known in special.items():
        ours = artifact.get(key)
        if not known or ours in known or (ours is None and "tokenizer.ggml.tokens" not in artifact):
            continue
        theirs = sorted(known)
        value = theirs[0] if len(theirs) == 1 else theirs
        # Without the key the engine takes its vocabulary type's own, which may well be right.
        note = "the tokenizer" if ours is not None else "the tokenizer; the engine has a default"
        rows.append(MetadataRow(key=key, artifact=ours, checkpoint=value, used=ours is not None, note=note))
    return rows


def unread(metadata: Metadata, arch: str) -> list[str]:
    """Hyperparameters (`<arch>.*`) that the reference's model does not ask for; empty where they make no model."""
    seen = _Seen(metadata)
    if _model(seen) is None:
        return []
    return [key for key in metadata if key.startswith(f"{arch}.") and key not in seen.asked]


class _Seen(Mapping[str, Any]):
    """Metadata that remember which keys were asked for."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self._metadata[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metadata)

    def __len__(self) -> int:
        return len(self._metadata)


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
