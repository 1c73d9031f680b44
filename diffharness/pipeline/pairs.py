"""An artifact and its checkpoint, opened for comparing tensors: also where no forward could be run on the file.

A file that lacks tensors or holds odd ones is what an inspection is for, so that only what makes comparing
senseless is refused: another architecture, other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffharness.errors import BadInputError, CheckpointError
from diffharness.weights.checkpoint import VOCABULARY, Checkpoint
from diffharness.weights.checkpoint_files import read_json
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.source import EMBEDDING, Float32Array, IntArray, TensorInfo, WeightSource
from diffharness.weights.vocab import tokenizer_metadata
from diffharness.words import listed

_NAMED = 5  # tensors named in a message
_MISSHAPEN = 0.25  # share of tensors of other shapes from which on the two are of different models


@dataclass(frozen=True)
class Pair:
    """`artifact` shows the rows of the vocabulary that both have; `file` is the artifact as it is."""

    file: GgufFile
    artifact: WeightSource
    checkpoint: Checkpoint
    surplus: dict[str, int] = field(default_factory=dict)  # rows that only the artifact has, by tensor

    def close(self) -> None:
        self.file.close()
        self.checkpoint.close()


def open_pair(model: Path, folder: Path) -> Pair:
    """Raises ArtifactFileError, CheckpointError; the latter names the first tensors whose shapes differ."""
    file = open_gguf(model)
    try:
        checkpoint = Checkpoint(folder)
        if checkpoint.arch != file.arch:
            raise CheckpointError(
                f"{checkpoint.label} is a {checkpoint.arch} model, the artifact {file.label} says {file.arch}",
                hint="give the checkpoint that the artifact was made from",
            )
        ours, theirs = _vocabulary(file), _vocabulary(checkpoint)
        if ours is not None and theirs is not None and theirs > ours:
            checkpoint = Checkpoint(folder, n_vocab=ours)  # converters drop padding behind the last token
        pair = Pair(file, file, checkpoint)
        if ours is not None and theirs is not None and ours > theirs:
            shared = SharedRows(file, theirs)
            pair = Pair(file, shared, checkpoint, shared.surplus)
        _check_shapes(pair)
        return pair
    except BadInputError:
        file.close()
        raise


def _vocabulary(source: WeightSource) -> int | None:
    info = source.tensors.get(EMBEDDING)
    return info.shape[0] if info is not None and len(info.shape) == 2 else None


def _check_shapes(pair: Pair) -> None:
    ours, theirs = pair.artifact.tensors, pair.checkpoint.tensors
    both = [name for name in theirs if name in ours]
    differing = [name for name in both if ours[name].shape != theirs[name].shape]
    if not differing or len(differing) < _MISSHAPEN * len(both):
        return
    told = [f"{name}: checkpoint {theirs[name].shape}, artifact {ours[name].shape}" for name in differing]
    raise CheckpointError(
        f"{len(differing)} of {len(both)} tensors of {pair.checkpoint.label} have other shapes than in "
        f"{pair.file.label}: {listed(told, _NAMED, '; ')}",
        hint="give the checkpoint that the artifact was made from",
    )


class SharedRows:
    """A source whose tensors of the vocabulary end after `n_vocab` rows: tokens added in a fine-tune are left out."""

    def __init__(self, base: WeightSource, n_vocab: int) -> None:
        self._base = base
        self.label, self.arch, self.metadata = base.label, base.arch, base.metadata
        self.surplus: dict[str, int] = {}
        self.tensors = dict(base.tensors)
        for name in VOCABULARY & self.tensors.keys():
            info = self.tensors[name]
            if len(info.shape) == 2 and info.shape[0] > n_vocab:
                self.surplus[name] = info.shape[0] - n_vocab
                n_bytes = info.n_bytes // info.shape[0] * n_vocab
                self.tensors[name] = TensorInfo(name, (n_vocab, *info.shape[1:]), info.type, n_bytes)

    def read(self, name: str) -> Float32Array:
        if name in self.surplus:
            return self._base.take(name, slice(0, self.tensors[name].shape[0]))
        return self._base.read(name)

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        if name in self.surplus and isinstance(rows, slice):
            rows = slice(*rows.indices(self.tensors[name].shape[0]))
        return self._base.take(name, rows)


# -- special tokens -----------------------------------------------------------------------------------


def special_tokens(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Ids that the checkpoint's files give for bos and eos, by GGUF key: a model may have several ends of text.

    From config.json and generation_config.json, and what a converter makes of tokenizer.json.
    """
    found: dict[str, set[int]] = {"bos": set(), "eos": set()}
    for config in (checkpoint.config, _text_part(checkpoint.config), _optional(checkpoint, "generation_config.json")):
        for kind, ids in found.items():
            value = config.get(f"{kind}_token_id")
            values = value if isinstance(value, list) else [value]
            ids |= {i for i in values if isinstance(i, int) and not isinstance(i, bool)}
    converted = _converted(checkpoint)
    for kind, ids in found.items():
        token = converted.get(f"tokenizer.ggml.{kind}_token_id")
        if isinstance(token, int):
            ids.add(token)
    return {f"tokenizer.ggml.{kind}_token_id": sorted(ids) for kind, ids in found.items()}


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else {}


def _optional(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    path = checkpoint.path / name
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def _converted(checkpoint: Checkpoint) -> Mapping[str, Any]:
    try:
        return tokenizer_metadata(checkpoint.path, _vocabulary(checkpoint) or 0, arch=checkpoint.arch)
    except CheckpointError:
        return {}
