"""Slices of layers: a model's layers first .. stop - 1 as a GGUF of its own, in F32, numbered from 0.

A slice has the model's metadata with what is said by layer cut to its layers, the vocabulary's place taken by a few
rows of the embedding, and the model's own last norm. The first slice takes tokens, each further one the hidden states
that the one before gave. What works on the input of the whole model is made to leave those alone: a scale of the
embedding becomes 1, learned positions become 0, and a scale that cannot be changed is divided out of the states. A
slice that ends the model can hold rows of the head in the vocabulary's place, and gives their logits.

What cannot be cut at all is told by `obstacle`; what llama.cpp makes of keys and architectures stands in
configs/slices.yaml. Whether a slice is the same model as those layers are of the whole is
not decided here: the reference can say, built from `cut`'s metadata.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from diffharness.engine.slice_facts import facts
from diffharness.weights.source import EMBEDDING, HEAD, Metadata, WeightSource

LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<rest>.+)")

# Tensors outside of the layers that a slice can have: as they are, by rows of the vocabulary, or (where it is fed with
# hidden states) as zeros.
ROPE_FACTORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
_LAST_NORM = "output_norm.weight"
_LAST_NORM_OTHERWISE = "token_embd_norm.weight"  # beside an output_norm it is the embedding's
_AS_IS = frozenset({_LAST_NORM, "output_norm.bias", *ROPE_FACTORS})
_HEAD_BIAS = "output.bias"
BY_VOCABULARY = frozenset({EMBEDDING, HEAD, _HEAD_BIAS})
ADDED_TO_INPUT = frozenset({"position_embd.weight"})

INPUT_SCALE = "embedding_scale"


@dataclass(frozen=True)
class Slice:
    """Layers first .. stop - 1. With `rows` of the head it gives their logits; a slice that ends the model has some."""

    first: int
    stop: int
    rows: slice | None = None
    is_new: bool = True  # False where its layers ran already, with another part of the head
    is_turned: bool = True  # whether any of its layers reads rope factors: llama.cpp refuses tensors that none reads

    @property
    def n_layer(self) -> int:
        return self.stop - self.first


def layer_count(metadata: Metadata) -> int:
    """`block_count`; 0 where the key is not a number."""
    value = metadata.get(f"{metadata.get('general.architecture')}.block_count")
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def obstacle(source: WeightSource, overrides: Sequence[str] = ()) -> str | None:
    """Why this model cannot be cut between layers at all, or None."""
    arch, metadata, n_layer = source.arch, source.metadata, layer_count(source.metadata)
    known, own = facts(), facts().of(arch)
    if n_layer < 2 * own.least_layers:
        return f"it has {n_layer} layers, and a slice has {own.least_layers} at least"
    if own.is_told_by(n_layer):
        return f"llama.cpp tells which {arch} model it is by its {n_layer} layers"
    if own.takes_states == "with sections" and not any(metadata.get(f"{arch}.rope.dimension_sections") or ()):
        return f"llama.cpp's {arch} graph takes nothing but tokens"
    for name, neutral in known.ties.items():
        value = metadata.get(f"{arch}.{name}", neutral)
        if set(value if isinstance(value, list) else [value]) - {neutral}:
            return f"{arch}.{name} is {value}, which ties layers to others or to the tokens"
    for key, value in metadata.items():
        name = key.removeprefix(f"{arch}.")
        if name == key or not isinstance(value, list) or name in known.whole | known.ties.keys():
            continue
        if name not in known.by_layer:
            return f"{key} is an array, and it is not known whether by layer"
        if len(value) != n_layer:
            return f"{key} has {len(value)} values for {n_layer} layers"
    for name in source.tensors:
        if not LAYER.fullmatch(name) and name not in _outside(source.tensors):
            return f"{name} works outside of the layers"
    for text in overrides:
        key = text.partition("=")[0]
        if key.removeprefix(f"{arch}.") in known.not_to_override:
            return f"an override of {key} says something of the whole model"
    return None


def _outside(tensors: Container[str]) -> frozenset[str]:
    """Tensors that may stand beside those of the layers."""
    last_norm = _LAST_NORM if _LAST_NORM in tensors else _LAST_NORM_OTHERWISE
    return _AS_IS | BY_VOCABULARY | ADDED_TO_INPUT | {last_norm}


def can_run(source: WeightSource, first: int, stop: int) -> bool:
    """Whether llama.cpp would take the slice, and for the same kind of model; see `cut` for what its layers are."""
    own, heads = facts().of(source.arch), source.metadata.get(f"{source.arch}.attention.head_count")
    # A first layer without heads turns attention off: sizes of heads are taken from it.
    same_start = not isinstance(heads, list) or bool(heads[first]) == bool(heads[0])
    return same_start and stop - first >= own.least_layers and not own.is_told_by(stop - first)


def cut(metadata: Metadata, first: int, stop: int) -> dict[str, Any]:
    """What differs in a slice's metadata: key to value. The layers' meaning only; see `write_slice` for the rest."""
    arch, n_layer = metadata["general.architecture"], stop - first
    changes: dict[str, Any] = {f"{arch}.block_count": n_layer}
    for name in facts().by_layer:
        value = metadata.get(f"{arch}.{name}")
        if isinstance(value, list):
            changes[f"{arch}.{name}"] = value[first:stop]
    if (by_depth := facts().of(arch).by_depth) is not None:
        key = f"{arch}.{by_depth.key}"
        changes[key] = metadata.get(key, by_depth.value(layer_count(metadata)))
    for name in facts().leading:
        count = metadata.get(f"{arch}.{name}")
        if isinstance(count, int):
            changes[f"{arch}.{name}"] = min(max(count - first, 0), n_layer)
    heads = metadata.get(f"{arch}.attention.head_count")
    if isinstance(heads, list) and heads[0]:  # llama.cpp takes the size of a head from the first layer's number of them
        size = metadata[f"{arch}.embedding_length"] // heads[0]
        for name in ("attention.key_length", "attention.value_length"):
            changes[f"{arch}.{name}"] = metadata.get(f"{arch}.{name}", size)
    return changes


def overrides_for(part: Slice, arch: str, overrides: Sequence[str]) -> list[str]:
    """The overrides that a slice gets: what scales the embedding only where there is one."""
    scale = f"{arch}.{INPUT_SCALE}="
    return [text for text in overrides if part.first == 0 or not text.startswith(scale)]


def input_factor(metadata: Metadata) -> float:
    """What llama.cpp multiplies a fed slice's input with."""
    arch = metadata["general.architecture"]
    return facts().of(arch).factor(metadata[f"{arch}.embedding_length"])


# -- sizes --------------------------------------------------------------------------------------------


def f32_bytes(source: WeightSource) -> int:
    """What the whole artifact takes as F32."""
    return sum(info.n_elements for info in source.tensors.values()) * 4


def layer_bytes(source: WeightSource) -> list[int]:
    """What each layer takes as F32."""
    sizes = [0] * layer_count(source.metadata)
    for name, info in source.tensors.items():
        found = LAYER.fullmatch(name)
        if found and int(found["layer"]) < len(sizes):
            sizes[int(found["layer"])] += info.n_elements * 4
    return sizes


def plan(
    source: WeightSource, pieces: Sequence[tuple[int, int]], budget: int, most_layers: int | None = None
) -> list[Slice]:
    """The slices to run, in order: as long as `budget` bytes and `most_layers` allow, of whole `pieces`, two at least.

    The head goes with the last slice; where it does not fit, the last piece runs once for every part of the vocabulary,
    which may take half the budget at least.
    """
    sizes = layer_bytes(source)
    groups: list[tuple[int, int]] = []
    for a, b in pieces:
        start = groups[-1][0] if groups else a
        fits = sum(sizes[start:b]) <= budget and b - start <= (most_layers or len(sizes))
        if groups and fits and not (start == 0 and b == len(sizes)):  # what ends the model must not take tokens
            groups[-1] = (start, b)
        else:
            groups.append((a, b))
    head = source.tensors[HEAD if HEAD in source.tensors else EMBEDDING]
    n_vocab, row = head.shape[0], head.n_elements // head.shape[0] * (6 if HEAD in source.tensors else 4)
    first, stop = groups.pop()
    if first < pieces[-1][0] and sum(sizes[first:stop]) + n_vocab * row > budget:
        groups.append((first, pieces[-1][0]))
        first = pieces[-1][0]
    step = max(budget - sum(sizes[first:stop]), budget // 2) // row or 1
    parts = [Slice(a, b) for a, b in groups]
    for at in range(0, n_vocab, step):
        parts.append(Slice(first, stop, slice(at, min(at + step, n_vocab)), is_new=at == 0))
    return parts
