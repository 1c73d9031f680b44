"""Slices of layers: a model's layers first .. stop - 1 as a GGUF of its own, in F32, numbered from 0.

A slice has the model's metadata with what is said by layer cut to its layers, the vocabulary's place taken by a few
rows of the embedding, and the model's own last norm. The first slice takes tokens, each further one the hidden states
that the one before gave. What works on the input of the whole model is made to leave those alone: a scale of the
embedding becomes 1, learned positions become 0, and a scale that cannot be changed is divided out of the states. A
slice that ends the model can hold rows of the head in the vocabulary's place, and gives their logits.

What cannot be cut at all is told by `obstacle`. Whether a slice is the same model as those layers are of the whole is
not decided here: the reference can say, built from `cut`'s metadata.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffharness.weights.source import EMBEDDING, HEAD, Metadata, WeightSource

LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<rest>.+)")

# Keys below `<arch>.` that llama.cpp reads as one value for each layer where they are arrays.
_BY_LAYER = frozenset({
    "attention.head_count", "attention.head_count_kv", "attention.indexer.types", "attention.recurrent_layers",
    "attention.sliding_window_pattern", "expert_feed_forward_length", "expert_used_count", "feed_forward_length",
    "swiglu_clamp_exp", "swiglu_clamp_shexp", "xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps",
})  # fmt: skip
# Arrays of another kind, which a slice has as the whole has them.
_NOT_BY_LAYER = frozenset({"rope.dimension_sections", "rope.pattern", "classifier.output_labels"})
# Arrays that say nothing while all of their values are this one; otherwise they tie layers to the model's input.
_SILENT: Mapping[str, int] = {"deepstack_mapping": -1}

# Keys that say something of the whole model that no slice can have, and the values under which they do not.
_WHOLE_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention.shared_kv_layers": (0,),  # later layers use the keys and values of earlier ones
    "embedding_length_per_layer_input": (0,),  # every layer looks the tokens up again
    "nextn_predict_layers": (0,),  # layers after the model's last
}
# Numbers of leading layers, of which a slice has what is left.
_LEADING = frozenset({"leading_dense_block_count", "n_deepstack_layers"})
# Architectures that take hidden states only of files made for images: with positions in sections.
_TOKENS_ONLY = frozenset({"glm4", "glm4moe"})

# Architectures whose variant llama.cpp tells by the number of layers, at which numbers (None: at any).
_TOLD_BY_DEPTH: Mapping[str, frozenset[int] | None] = {
    "baichuan": None,  # 32 layers are turned by position, 40 are ALiBi's
    "deepseek2": frozenset({26, 27, 47, 48}),  # lite, without a compressed query; GLM's gating
    "exaone4": frozenset({64}),  # slides only then
    "gemma2": frozenset({46}),  # the 27B's scale of scores
    "gemma3": frozenset({62}),
    "minicpm3": None,  # scales what layers add by their number
    "minimax-01": None,  # each layer's decay is a share of the number of layers
    "smallthinker": None,
}

# What llama.cpp multiplies any input with, tokens or not, by the width of the hidden states.
_INPUT_FACTORS: Mapping[str, Callable[[int], float]] = {
    "afmoe": math.sqrt,
    "gemma": math.sqrt,
    "gemma2": math.sqrt,
}
# What llama.cpp takes where a key is missing, by the number of layers of the whole.
_BY_DEPTH: Mapping[str, tuple[str, Callable[[int], float]]] = {
    "minicpm": ("residual_scale", lambda n_layer: 1.4 / math.sqrt(n_layer)),
}

# Layers that a model of an architecture has at least.
_LEAST_LAYERS: Mapping[str, int] = {"gemma4": 2}

# Tensors outside of the layers that a slice can have: as they are, by rows of the vocabulary, or (where it is fed with
# hidden states) as zeros.
ROPE_FACTORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
_AS_IS = frozenset({"output_norm.weight", "output_norm.bias", *ROPE_FACTORS})
_LAST_NORM: Mapping[str, frozenset[str]] = dict.fromkeys(("lfm2", "lfm2moe"), frozenset({"token_embd_norm.weight"}))
_HEAD_BIAS = "output.bias"
BY_VOCABULARY = frozenset({EMBEDDING, HEAD, _HEAD_BIAS})
ADDED_TO_INPUT = frozenset({"position_embd.weight"})

# Keys that an override gives to the whole; cut, they would say something else.
_POSITIONAL = frozenset({
    *_WHOLE_ONLY, *_LEADING, "attention.sliding_window_pattern", "block_count", "full_attention_interval",
    "interleave_moe_layer_step", "vocab_size",
})  # fmt: skip
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
    least = _LEAST_LAYERS.get(arch, 1)
    if n_layer < 2 * least:
        return f"it has {n_layer} layers, and a slice has {least} at least"
    depths = _TOLD_BY_DEPTH.get(arch, frozenset())
    if depths is None or n_layer in depths:
        return f"llama.cpp tells which {arch} model it is by its {n_layer} layers"
    if arch in _TOKENS_ONLY and not any(metadata.get(f"{arch}.rope.dimension_sections") or ()):
        return f"llama.cpp's {arch} graph takes nothing but tokens"
    for name, neutral in _WHOLE_ONLY.items():
        if (value := metadata.get(f"{arch}.{name}", neutral[0])) not in neutral:
            return f"{arch}.{name} is {value}, which ties layers to others or to the tokens"
    for key, value in metadata.items():
        name = key.removeprefix(f"{arch}.")
        if name == key or not isinstance(value, list) or name in _NOT_BY_LAYER or set(value) == {_SILENT.get(name)}:
            continue
        if name not in _BY_LAYER:
            return f"{key} is an array, and it is not known whether by layer"
        if len(value) != n_layer:
            return f"{key} has {len(value)} values for {n_layer} layers"
    known = _AS_IS | BY_VOCABULARY | ADDED_TO_INPUT | _LAST_NORM.get(arch, frozenset())
    for name in source.tensors:
        if name not in known and not LAYER.fullmatch(name):
            return f"{name} works outside of the layers"
    for text in overrides:
        key = text.partition("=")[0]
        if key.removeprefix(f"{arch}.") in _POSITIONAL:
            return f"an override of {key} says something of the whole model"
    return None


def can_run(source: WeightSource, first: int, stop: int) -> bool:
    """Whether llama.cpp would take the slice, and for the same kind of model; see `cut` for what its layers are."""
    if stop - first < _LEAST_LAYERS.get(source.arch, 1):
        return False
    depths = _TOLD_BY_DEPTH.get(source.arch, frozenset())
    heads = source.metadata.get(f"{source.arch}.attention.head_count")
    # A first layer without heads turns attention off: sizes of heads are taken from it.
    same_start = not isinstance(heads, list) or bool(heads[first]) == bool(heads[0])
    return same_start and depths is not None and stop - first not in depths


def cut(metadata: Metadata, first: int, stop: int) -> dict[str, Any]:
    """What differs in a slice's metadata: key to value. The layers' meaning only; see `write_slice` for the rest."""
    arch, n_layer = metadata["general.architecture"], stop - first
    changes: dict[str, Any] = {f"{arch}.block_count": n_layer}
    for name in _BY_LAYER:
        value = metadata.get(f"{arch}.{name}")
        if isinstance(value, list):
            changes[f"{arch}.{name}"] = value[first:stop]
    if arch in _BY_DEPTH:
        name, default = _BY_DEPTH[arch]
        changes[f"{arch}.{name}"] = metadata.get(f"{arch}.{name}", default(layer_count(metadata)))
    for name in _LEADING:
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
    return _INPUT_FACTORS[arch](metadata[f"{arch}.embedding_length"]) if arch in _INPUT_FACTORS else 1.0


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
