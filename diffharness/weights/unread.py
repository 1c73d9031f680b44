"""Tensors of a checkpoint that its architecture's map has no use for: which are harmless, and which may be the model's.

A checkpoint with biases, norms or experts that its config.json does not announce is another model than the one that
would be computed, and no witness to anything. So a tensor that nobody reads must be known to say nothing about text, or
lie outside of the text model: other towers, other heads, modules for training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.safetensors_file import SafetensorsFile

# What old checkpoints keep beside weights and every program computes anew.
_BUFFERS = re.compile(r"(^|\.)(rotary(_pos)?(_emb)?\.[a-z_]+|position_ids|embeddings\.position_ids)$")
_ROWS = 64  # of a head are compared with the embedding's
_IN_LAYER = re.compile(r"(?P<model>.*?)[^.]+\.\d+\.")


@dataclass(frozen=True)
class Unread:
    """Tensors of a checkpoint that no rule reads, sorted out; each in the checkpoint's order."""

    ignored: list[str]  # known not to matter
    extra: list[str]  # outside of the text model
    mattering: list[str]  # within it, and unknown


def sort_out(names: Iterable[str], read: Iterable[str], ignored: Sequence[str] = ()) -> Unread:
    """Sort out the tensors `names`, of which those in `read` are read; `ignored` are the map's prefixes.

    The text model is everything below what its layers are below (`model.` of `model.layers.0.`), and the modules
    outside of that of which something is read (`lm_head`). A prefix that is one whole layer is not ignored where that
    layer is read.
    """
    known = set(read)
    models = {found["model"] for name in known if (found := _IN_LAYER.match(name))}
    modules = {_module(name) for name in known}
    layers = {found.group() for name in known if (found := _IN_LAYER.match(name))}
    harmless = tuple(prefix for prefix in ignored if prefix not in layers)
    out = Unread([], [], [])
    for name in names:
        if name in known:
            continue
        if name.startswith(harmless) or _BUFFERS.search(name):
            out.ignored.append(name)
        elif name.startswith(tuple(models)) or _module(name) in modules:
            out.mattering.append(name)
        else:
            out.extra.append(name)
    return out


def second_heads(where: Mapping[str, SafetensorsFile], read: Iterable[str], embedding: str) -> list[str]:
    """Heads in the files of a model whose head is its embedding, as config.json says: copies of that, and no more.

    `where` names each tensor's file. Compared by some rows, as a head that was trained apart differs in each; raises
    CheckpointError for such a one.
    """
    known, stored = set(read), where[embedding].tensors[embedding]
    heads = [name for name in where if name not in known and f".{name}".endswith(".lm_head.weight")]
    rows = np.linspace(0, stored.shape[0] - 1, _ROWS).astype(np.int64)
    for name in heads:
        head = where[name].tensors[name]
        if head.shape == stored.shape and np.array_equal(
            where[name].read(name, rows), where[embedding].read(embedding, rows)
        ):
            continue
        raise CheckpointError(
            f"{where[name].path.parent.name}: config.json says that the head is the embedding, but {name} is another "
            f"tensor than {embedding}",
            hint="set `tie_word_embeddings` in config.json to false, or remove the tensor, whichever is true",
        )
    return heads


def _module(name: str) -> str:
    """`lm_head` of `lm_head.bias`."""
    return name.rpartition(".")[0]
