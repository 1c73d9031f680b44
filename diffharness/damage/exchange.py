"""Faults of place: the right numbers in the wrong rows, heads, experts, tensors or layers.

Whole rows are moved as they are stored, so that nothing but their place changes; what another tensor of
another type held is stored in the type of the tensor that it came to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffharness.damage.draft import Bytes, Content, Draft, Edit, Fault, Plan, Target, from_bytes, share_of
from diffharness.damage.values import fitting
from diffharness.errors import BadInputError
from diffharness.taps import split
from diffharness.weights.names import RotaryPairs
from diffharness.weights.source import Float32Array, IntArray, TensorInfo

_Heads = tuple[int, int]  # of queries, of keys and values


def heads_of(draft: Draft, layer: int | None) -> _Heads:
    """How many heads a layer has; (1, 1) where the metadata do not say."""
    queries = _of_layer(draft.get(f"{draft.arch}.attention.head_count"), layer) or 1
    return queries, _of_layer(draft.get(f"{draft.arch}.attention.head_count_kv"), layer) or queries


def _of_layer(value: Any, layer: int | None) -> int | None:
    if isinstance(value, list | tuple):
        value = value[layer] if layer is not None and layer < len(value) else None
    return value if isinstance(value, int) and value > 0 else None


def moved(n: int, share: float, rng: np.random.Generator) -> IntArray:
    """An order of `n` things in which a share of them, at least two, is where another was."""
    order = np.arange(n)
    hit = np.sort(rng.permutation(n)[: share_of(n, share, least=2)])
    # Turned by one place after a shuffle: none of them stays.
    shuffled = rng.permutation(hit)
    order[shuffled] = np.roll(shuffled, 1)
    return order


# -- rows of one tensor --------------------------------------------------------------------------------

_Order = Callable[[TensorInfo, _Heads, float, np.random.Generator], IntArray]  # of the rows of one matrix
_FitsHeads = Callable[[TensorInfo, _Heads], str | None]


def _rows_plan(order: _Order, said: str, fits: _FitsHeads) -> Plan:
    def plan(draft: Draft, target: Target) -> Edit:
        def reason(info: TensorInfo) -> str | None:
            return fits(info, heads_of(draft, split(info.name)[0]))

        names = fitting(draft, target, reason)

        def content(name: str) -> Content:
            before = draft.contents[name]
            info = before.info

            def raw() -> Bytes:
                rng = draft.rng(target.fault, name)
                rows = order(info, heads_of(draft, split(name)[0]), target.strength, rng)
                return before.raw().reshape(len(rows), -1)[rows].reshape(-1)

            return from_bytes(info, raw)

        text = said.format(strength=f"{target.strength:g}")
        return Edit({name: content(name) for name in names}, dict.fromkeys(names, text))

    return plan


def _n_heads(info: TensorInfo, heads: _Heads) -> int:
    """Of the tensor itself: that of keys and values is another than that of queries."""
    return heads[1] if split(info.name)[1].startswith(("attn_k", "attn_v")) else heads[0]


def _row_order(info: TensorInfo, heads: _Heads, share: float, rng: np.random.Generator) -> IntArray:
    return moved(info.shape[0], share, rng)


def _head_order(info: TensorInfo, heads: _Heads, share: float, rng: np.random.Generator) -> IntArray:
    n = _n_heads(info, heads)
    return np.arange(info.shape[0]).reshape(n, -1)[moved(n, share, rng)].reshape(-1)


def _interleave(info: TensorInfo, heads: _Heads, share: float, rng: np.random.Generator) -> IntArray:
    return _as_rows(RotaryPairs(_n_heads(info, heads)).to_gguf, info.shape[0])


def _halve(info: TensorInfo, heads: _Heads, share: float, rng: np.random.Generator) -> IntArray:
    return _as_rows(lambda parts: RotaryPairs(_n_heads(info, heads)).to_hf(parts[0])[0], info.shape[0])


def _as_if_all_heads(info: TensorInfo, heads: _Heads, share: float, rng: np.random.Generator) -> IntArray:
    """Keys brought to rotary pairs as though there were as many as queries."""
    back = _halve(info, heads, share, rng)
    return back[_as_rows(RotaryPairs(heads[0]).to_gguf, info.shape[0])]


def _as_rows(move: Callable[[list[Any]], Any], n: int) -> IntArray:
    return np.asarray(move([np.arange(n)]), dtype=np.int64)


def _has_rows(info: TensorInfo, heads: _Heads) -> str | None:
    return None if len(info.shape) == 2 and info.shape[0] > 1 else "it is no matrix of several rows"


def _has_heads(info: TensorInfo, heads: _Heads) -> str | None:
    if not _is_projection(info) or info.shape[0] % _n_heads(info, heads):
        return "its rows are not those of heads"
    return None if _n_heads(info, heads) > 1 else "it has a single head"


def _has_pairs(info: TensorInfo, heads: _Heads) -> str | None:
    rows, n = info.shape[0], _n_heads(info, heads)
    return None if _is_projection(info) and rows % (2 * n) == 0 and rows // n > 2 else "it has no rotary pairs"


def _is_projection(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and split(info.name)[1].startswith(("attn_q.", "attn_k.", "attn_v."))


def _has_fewer_heads(info: TensorInfo, heads: _Heads) -> str | None:
    if heads[0] == heads[1]:
        return "the model has as many heads of keys as of queries"
    return _has_pairs(info, heads) or (None if info.shape[0] % (2 * heads[0]) == 0 else "its rows do not divide")


def _has_experts(info: TensorInfo, heads: _Heads) -> str | None:
    return None if len(info.shape) == 3 and info.shape[0] > 1 else "it holds no experts"


# -- tensors for tensors -------------------------------------------------------------------------------

_Pairing = Callable[[Draft, Target], Mapping[str, str]]  # tensor -> the one whose content it gets


def _places_plan(pairing: _Pairing) -> Plan:
    def plan(draft: Draft, target: Target) -> Edit:
        pairs = pairing(draft, target)
        return Edit(
            {name: taken(draft, name, other) for name, other in pairs.items()},
            {name: f"holds {other}" for name, other in pairs.items()},
        )

    return plan


def taken(draft: Draft, name: str, other: str) -> Content:
    """Tensor `name` with what `other`, of the same shape, holds; its bytes where the types are the same."""
    info, theirs = draft.contents[name].info, draft.contents[other]
    if info.type == theirs.info.type:
        return from_bytes(info, theirs.raw)

    def values() -> Float32Array:
        return theirs.values()

    return draft.changed(name, values)


def _layers_among(draft: Draft, target: Target) -> Mapping[str, str]:
    """Whole layers in another order, among layers of the same tensors and shapes."""
    layers: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name in target.names:
        layer, klass = split(name)
        if layer is not None:
            layers[layer][klass] = draft.contents[name].info.shape
    alike: dict[frozenset[tuple[str, tuple[int, ...]]], list[int]] = defaultdict(list)
    for layer, shapes in layers.items():
        alike[frozenset(shapes.items())].append(layer)
    pairs: dict[str, str] = {}
    for group in alike.values():
        if len(group) > 1:
            order = moved(len(group), target.strength, draft.rng(target.fault, *group))
            for layer, source in zip(group, (group[i] for i in order), strict=True):
                if layer != source:
                    pairs |= {f"blk.{layer}.{klass}": f"blk.{source}.{klass}" for klass in layers[layer]}
    return pairs or _nothing(target, "no two of the layers have tensors of the same shapes")


def _classes(partner: Mapping[str, str]) -> _Pairing:
    """Tensors of each layer exchanged with their partners; names within the layer, without `.weight`."""

    def pairing(draft: Draft, target: Target) -> Mapping[str, str]:
        pairs: dict[str, str] = {}
        both = " or ".join(f"{one} and {two}" for one, two in partner.items())
        reason = f"no layer of those chosen has {both}"
        for name in target.names:
            layer, klass = split(name)
            stem, dot, kind = klass.rpartition(".")
            other = f"blk.{layer}.{partner.get(stem)}{dot}{kind}"
            if other not in draft.contents:
                continue
            shapes = draft.contents[name].info.shape, draft.contents[other].info.shape
            if shapes[0] == shapes[1]:
                pairs |= {name: other, other: name}
            else:
                reason = f"{name} is {shapes[0]}, {other} is {shapes[1]}"
        return pairs or _nothing(target, reason)

    return pairing


def _of_other_layers(draft: Draft, target: Target) -> Mapping[str, str]:
    """Some tensors get what the same tensor of the nearest earlier (else later) layer of that shape holds."""
    pairs: dict[str, str] = {}
    order = draft.rng(target.fault).permutation(len(target.names))
    for name in (target.names[i] for i in order):
        layer, klass = split(name)
        others = sorted(
            (
                (abs(there - layer), there > layer, other)
                for other in draft.contents
                for there, theirs in [split(other)]
                if layer is not None and there is not None and there != layer and theirs == klass
                and draft.contents[other].info.shape == draft.contents[name].info.shape
                and other not in pairs
            )
        )  # fmt: skip
        if others and name not in pairs.values() and len(pairs) < int(target.strength):
            pairs[name] = others[0][2]
    return pairs or _nothing(target, "no tensor has one of the same class and shape in another layer")


def _swapped(draft: Draft, target: Target) -> Mapping[str, str]:
    """Pairs of tensors of one shape, drawn at random, exchanged."""
    pairs: dict[str, str] = {}
    order = draft.rng(target.fault).permutation(len(target.names))
    waiting: dict[tuple[int, ...], str] = {}
    for name in (target.names[i] for i in order):
        shape = draft.contents[name].info.shape
        other = waiting.pop(shape, None)
        if other is None:
            waiting[shape] = name
        elif len(pairs) < 2 * int(target.strength):
            pairs |= {name: other, other: name}
    return pairs or _nothing(target, "no two of the tensors have the same shape")


def _nothing(target: Target, reason: str) -> Mapping[str, str]:
    raise BadInputError(
        f"{target.fault} changes nothing: {reason}", hint="choose other tensors with --tensors and --layers"
    )


def _drop(draft: Draft, target: Target) -> Edit:
    return Edit(removed=target.names, said=dict.fromkeys(target.names, "left out"))


_SHARE = (0.0, 1.0)
_COUNT = (1.0, 1e6)
_QK = "blk.*.attn_q.weight,blk.*.attn_k.weight"

FAULTS = [
    Fault("permuted-rows", "rows in another order", "permuted rows",
          _rows_plan(_row_order, "{strength} of its rows moved", _has_rows), "blk.*.ffn_up.weight", 1.0,
          "share of the rows", _SHARE),
    Fault("permuted-heads", "heads in another order", "permuted heads",
          _rows_plan(_head_order, "{strength} of its heads moved", _has_heads), "blk.*.attn_q.weight", 1.0,
          "share of the heads", _SHARE),
    Fault("permuted-experts", "experts in another order", "permuted experts",
          _rows_plan(_row_order, "{strength} of its experts moved", _has_experts), "blk.*_exps.weight", 1.0,
          "share of the experts", _SHARE),
    Fault("rope-interleaved", "rows of each head from half-split to interleaved rotary pairs (once too often, or for "
          "an architecture that has them half-split)", "Q/K permutation",
          _rows_plan(_interleave, "rotary pairs interleaved", _has_pairs), _QK),
    Fault("rope-half-split", "rows of each head from interleaved to half-split rotary pairs (as Hugging Face has them)",
          "Q/K permutation", _rows_plan(_halve, "rotary pairs split in halves", _has_pairs), _QK),
    Fault("rope-all-heads", "rotary pairs of the keys arranged as though there were as many heads as of queries",
          "Q/K permutation",
          _rows_plan(_as_if_all_heads, "rotary pairs by the number of query heads", _has_fewer_heads),
          "blk.*.attn_k.weight"),
    Fault("permuted-layers", "layers in another order, among layers alike in shape", "permuted layers",
          _places_plan(_layers_among), "blk.*", 1.0, "share of the layers", _SHARE),
    Fault("swapped-gate-up", "gate and up projections exchanged", "gate/up exchanged",
          _places_plan(_classes({"ffn_gate": "ffn_up", "ffn_gate_exps": "ffn_up_exps"})),
          "blk.*.ffn_gate.*,blk.*.ffn_gate_exps.*"),
    Fault("swapped-q-k", "query and key projections exchanged", "Q/K exchanged",
          _places_plan(_classes({"attn_q": "attn_k"})), "blk.*.attn_q.*"),
    Fault("swapped-k-v", "key and value projections exchanged", "tensors exchanged",
          _places_plan(_classes({"attn_k": "attn_v"})), "blk.*.attn_k.*"),
    Fault("swapped", "pairs of tensors of one shape exchanged", "tensors exchanged",
          _places_plan(_swapped), "blk.*.weight", 1, "how many pairs", _COUNT),
    Fault("duplicated", "tensors that hold those of another layer", "duplicated tensor",
          _places_plan(_of_other_layers), "blk.*.ffn_down*", 1, "how many tensors", _COUNT),
    Fault("missing", "tensors left out", "missing tensors", _drop, "blk.*.layer_output_scale*"),
]  # fmt: skip
