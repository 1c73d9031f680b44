"""Groups of tensors and metadata keys that are exchanged together between an artifact and its checkpoint.

Classes are those of `forensics.classes`, but for scalars and tensors without a class, which go by their own GGUF names:
`layer_output_scale` says more than `scalars`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from diffharness.errors import BadInputError
from diffharness.forensics.classes import CLASSES, OTHER, class_of
from diffharness.layers import describe_layers, parse_layers, ranges
from diffharness.taps import split


@dataclass(frozen=True)
class Group:
    """What is exchanged together, and what it is called."""

    label: str
    tensors: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()  # of the metadata

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(il for il in (split(name)[0] for name in self.tensors) if il is not None)


def joined(groups: Iterable[Group]) -> Group:
    """One group of all that the groups hold."""
    tensors, keys = frozenset[str](), frozenset[str]()
    for group in groups:
        tensors, keys = tensors | group.tensors, keys | group.keys
    return Group("", tensors, keys)


def family(name: str) -> str:
    """What a tensor is put back with: its class, or its own name without its layer where the class is a mixed bag."""
    klass, rest = class_of(name), split(name)[1]
    return rest.rpartition(".")[0] or rest if klass in ("scalars", "ssm", OTHER) else klass


def by_class(names: Collection[str]) -> list[Group]:
    """One group per class, in the order of a layer's computation."""
    return _grouped(names, family, str, lambda label: (_rank(label), label))


def by_layer(names: Collection[str]) -> list[Group]:
    """One group per layer; what lies outside of the layers by class."""
    return by_block(names, 1)


def by_block(names: Collection[str], size: int) -> list[Group]:
    """One group per `size` neighbouring layers; what lies outside of the layers by class."""
    inside = {name for name in names if split(name)[0] is not None}

    def first(name: str) -> int:
        return _layer(name) // size * size

    blocks = _grouped(inside, first, lambda at: _layers_label(range(at, at + size)), lambda at: at)
    blocks = [Group(_layers_label(group.layers), group.tensors) for group in blocks]
    outside = by_class(set(names) - inside)
    return [g for g in outside if not _is_head(g)] + blocks + [g for g in outside if _is_head(g)]


def by_layers(names: Collection[str], text: str, n_layer: int) -> Group:
    """The layers that `text` lists, such as `0-5` or `0,1,6-8`. BadInputError if it lists none of the model's."""
    layers = parse_layers(text, n_layer)
    tensors = frozenset(name for name in names if split(name)[0] in layers)
    return Group(_layers_label(layers), tensors)


def by_glob(names: Collection[str], pattern: str) -> Group:
    """The tensors whose names fit. BadInputError if none does."""
    tensors = frozenset(name for name in names if fnmatchcase(name, pattern))
    if not tensors:
        raise BadInputError(
            f"expected tensors that fit {pattern!r}, found none",
            hint="names are GGUF's, such as `blk.0.attn_q.weight`; `blk.*.attn_q.weight` fits every layer's",
        )
    return Group(pattern, tensors)


def of_keys(keys: Iterable[str]) -> list[Group]:
    """One group per metadata key."""
    return [Group(key, keys=frozenset({key})) for key in keys]


def halves(group: Group) -> list[Group]:
    """The group in two runs of its layers, each of one class; the group alone where it cannot be cut further."""
    layers = sorted(group.layers)
    if len(layers) < 2:
        return [group]
    cut = layers[len(layers) // 2]
    first = frozenset(name for name in group.tensors if (split(name)[0] or 0) < cut)
    return [_of_class(group, part) for part in (first, group.tensors - first) if part]


def limited(groups: Iterable[Group], names: Collection[str]) -> list[Group]:
    """The groups with only those tensors that are in `names`; keys stay, and groups without anything go."""
    found = [Group(g.label, g.tensors & frozenset(names), g.keys) for g in groups]
    return [g for g in found if g.tensors or g.keys]


def in_words(groups: Collection[Group], kinds: Sequence[str], names: Collection[str]) -> str:
    """`layer_output_scale in all layers; ffn_down in only layers 2-5, 8-11; embedding` for what the groups hold.

    `kinds[i]` is what the architecture calls layer i, `names` are all of the model's tensors.
    """
    whole = joined(groups)
    has: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if split(name)[0] is not None:
            has[family(name)].add(_layer(name))
    where: dict[str, list[str]] = defaultdict(list)
    for group in by_class(whole.tensors):
        if not group.layers:
            where[""].append(group.label)
            continue
        every = group.layers == has[group.label] and len(group.layers) < len(kinds)
        place = f"every layer that has it ({ranges(group.layers)})" if every else describe_layers(group.layers, kinds)
        where[f" in {place}"].append(group.label)
    parts = [", ".join(labels) + place for place, labels in where.items()]
    return "; ".join([*parts, *sorted(whole.keys)]) or "nothing"


def _grouped(
    names: Iterable[str],
    key: Callable[[str], Hashable],
    label: Callable[..., str],
    order: Callable[..., Any],
) -> list[Group]:
    found: dict[Hashable, set[str]] = defaultdict(set)
    for name in names:
        found[key(name)].add(name)
    return [Group(label(at), frozenset(found[at])) for at in sorted(found, key=order)]


def _of_class(group: Group, tensors: frozenset[str]) -> Group:
    """Part of a group, called by its classes and layers."""
    classes = ", ".join(g.label for g in by_class(tensors))
    part = Group(classes, tensors)
    return Group(f"{classes}, {_layers_label(part.layers)}", tensors)


def _layers_label(layers: Collection[int]) -> str:
    return f"layer {ranges(layers)}" if len(layers) == 1 else f"layers {ranges(layers)}"


def _layer(name: str) -> int:
    layer = split(name)[0]
    assert layer is not None, "asked for only inside of layers"
    return layer


def _rank(label: str) -> int:
    return CLASSES.index(label) if label in CLASSES else CLASSES.index(OTHER)


def _is_head(group: Group) -> bool:
    return group.label in ("output", "norms")
