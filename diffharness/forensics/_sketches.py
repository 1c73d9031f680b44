"""Which tensor of the checkpoint a damaged one really is: few rows of every tensor of its shape, then the best in full.

What is found becomes words only for all tensors together (`tell_sources`): layers in another order, gate and up
exchanged, one tensor stored under two names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffharness.forensics._pair import nmse
from diffharness.layers import ranges
from diffharness.records.inspect import PatternRow
from diffharness.taps import split
from diffharness.weights.source import Float32Array, TensorInfo, WeightSource
from diffharness.words import listed

_ROWS = 8  # rows of a matrix in a sketch (one expert of a stack)
_COLUMNS = 512  # values of each
_NEARER = 0.5  # NMSE of another tensor's sketch over that of its own, from which on it is compared in full
_FEWEST = 8  # values below which a tensor cannot be told from another

NAMES = {
    frozenset({"ffn_gate", "ffn_up"}): ("gate_up_exchanged", "gate and up exchanged"),
    frozenset({"ffn_gate_exps", "ffn_up_exps"}): ("gate_up_exchanged", "gate and up of the experts exchanged"),
    frozenset({"attn_q", "attn_k"}): ("q_k_exchanged", "Q and K exchanged"),
    frozenset({"attn_k", "attn_v"}): ("k_v_exchanged", "K and V exchanged"),
}


class Sketches:
    """Samples of the checkpoint's tensors, read once per shape."""

    def __init__(self, checkpoint: WeightSource) -> None:
        self._checkpoint = checkpoint
        self._by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for info in checkpoint.tensors.values():
            self._by_shape[info.shape].append(info.name)
        self._made: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def candidate(self, artifact: WeightSource, name: str) -> str | None:
        """The other tensor of the checkpoint that the artifact's is most like; None if it is not clearly one."""
        info = artifact.tensors[name]
        names = self._by_shape.get(info.shape, [])
        if info.n_elements < _FEWEST or not names or names == [name]:
            return None
        if info.shape not in self._made:
            self._made[info.shape] = np.stack([sketch(self._checkpoint, self._checkpoint.tensors[n]) for n in names])
        sketches, own = self._made[info.shape], sketch(artifact, info)
        if not np.isfinite(own).all() or (own == own[0]).all():
            return None
        errors = np.array([nmse(own, other) for other in sketches])
        best = int(errors.argmin())
        before = min(2.0, float(errors[names.index(name)])) if name in names else 2.0
        return names[best] if names[best] != name and errors[best] < _NEARER * before else None


def sketch(source: WeightSource, info: TensorInfo) -> Float32Array:
    """Some values of a tensor, from the same places in every tensor of its shape."""
    n_rows = info.shape[0]
    if len(info.shape) == 1:
        values = source.read(info.name)
    else:
        n = 1 if len(info.shape) > 2 else min(_ROWS, n_rows)
        values = source.take(info.name, np.unique(np.linspace(0, n_rows - 1, n + 2)[1:-1].astype(np.int64)))
    flat = values.reshape(-1)
    most = _ROWS * _COLUMNS
    return np.ascontiguousarray(flat[:: flat.size // most | 1][:most] if flat.size > most else flat)


@dataclass(frozen=True)
class Origin:
    """The artifact's tensor `name` holds the checkpoint's `source`, but for `residual` (NMSE)."""

    name: str
    source: str
    residual: float


def tell_sources(origins: Sequence[Origin], everything: Sequence[str]) -> list[PatternRow]:
    """One row per thing that happened. `everything`: the names of all compared tensors."""
    source_of = {origin.name: origin.source for origin in origins}
    rows, told = [], set[str]()
    for found in (_exchanged_classes(source_of), _moved_layers(source_of), _others(source_of)):
        for kind, message, names, evidence in found:
            names = [name for name in names if name not in told]
            if not names:
                continue
            told |= set(names)
            for name in names:
                source_of.pop(name)
            left = max(origin.residual for origin in origins if origin.name in names)
            evidence = evidence | {"residual": left}
            rows.append(PatternRow(kind=kind, message=message, tensors=names, evidence=evidence))
    return rows


_Told = tuple[str, str, list[str], dict[str, object]]


def _exchanged_classes(source_of: Mapping[str, str]) -> list[_Told]:
    """Two tensors of one layer in each other's place, by the two classes."""
    pairs: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    for name, source in source_of.items():
        (layer, klass), (there, other) = split(name), split(source)
        if source_of.get(source) == name and layer == there and klass < other:
            pairs[klass, other].append(layer)
    told: list[_Told] = []
    merged: dict[tuple[str, str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (one, two), layers in pairs.items():
        short = frozenset({one.rsplit(".", 1)[0], two.rsplit(".", 1)[0]})
        kind, words = NAMES.get(short, ("exchanged", f"{' and '.join(sorted(short))} exchanged"))
        at = tuple(sorted(il for il in layers if il is not None))
        merged[kind, words, at] += [_name(il, klass) for il in layers for klass in (one, two)]
    for (kind, words, at), names in merged.items():
        where = "" if not at else f" in layer {at[0]}" if len(at) == 1 else f" in layers {ranges(at)}"
        told.append((kind, words + where, names, {"layers": list(at), "from": {n: source_of[n] for n in names}}))
    return told


def _moved_layers(source_of: Mapping[str, str]) -> list[_Told]:
    """Tensors of the same class in other layers, where the layers agree among their classes."""
    moves: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, source in source_of.items():
        (layer, klass), (there, other) = split(name), split(source)
        if klass == other and layer is not None and there is not None:
            moves[layer, there].append(name)
    by_layer: dict[int, set[int]] = defaultdict(set)
    for layer, there in moves:
        by_layer[layer].add(there)
    groups: dict[frozenset[str], dict[int, int]] = defaultdict(dict)  # classes -> layer map
    members: dict[frozenset[str], list[str]] = defaultdict(list)
    for (layer, there), names in sorted(moves.items()):
        if len(by_layer[layer]) == 1:
            classes = frozenset(split(name)[1] for name in names)
            groups[classes][layer] = there
            members[classes] += names
    # Layers whose tensors moved alike are one event, also where a class was not told apart in some of them.
    joined = _join(groups)
    told: list[_Told] = []
    for classes, layer_map in joined:
        names = [n for key, layers in groups.items() for n in members[key] if key <= classes and split(n)[0] in layers]
        names = [n for n in dict.fromkeys(names) if layer_map.get(split(n)[0] or 0) == split(source_of[n])[0]]
        if len(names) == 1:  # no layer, but a tensor: for `_others`
            continue
        moved = sorted(layer_map)
        cyclic = set(layer_map.values()) == set(moved)
        kind = "permuted_layers" if cyclic else "repeated_layers"
        arrows = listed([f"{il} holds {layer_map[il]}" for il in moved])
        lead = "layers in another order" if cyclic else "layers hold what others have"
        what = "" if len(classes) > 4 else f" ({', '.join(sorted(k.removesuffix('.weight') for k in classes))})"
        if len(moved) == 2 and cyclic:
            lead, arrows = f"layers {moved[0]} and {moved[1]} exchanged", ""
        steps = {layer_map[il] - il for il in moved}
        evidence: dict[str, object] = {"layer_map": {str(il): layer_map[il] for il in moved}}
        if len(steps) == 1:
            evidence["shift"] = steps.pop()
        told.append((kind, f"{lead}{what}{': ' if arrows else ''}{arrows}", names, evidence))
    return told


def _join(groups: Mapping[frozenset[str], Mapping[int, int]]) -> list[tuple[frozenset[str], dict[int, int]]]:
    """Groups of classes whose layer maps do not contradict each other and share layers' targets, as one."""
    out: list[tuple[frozenset[str], dict[int, int]]] = []
    for classes, layer_map in sorted(groups.items(), key=lambda item: (-len(item[0]), sorted(item[0]))):
        for i, (others, joined) in enumerate(out):
            if (classes & others) and all(joined.get(il, there) == there for il, there in layer_map.items()):
                out[i] = (others | classes, joined | dict(layer_map))
                break
        else:
            out.append((classes, dict(layer_map)))
    return out


def _others(source_of: Mapping[str, str]) -> list[_Told]:
    """Whatever is left: cycles of tensors, and single tensors that hold another's values."""
    swapped = sorted({tuple(sorted((n, s))) for n, s in source_of.items() if source_of.get(s) == n})
    told: list[_Told] = [
        ("exchanged", f"{one} and {two} exchanged", [one, two], {"from": {one: two, two: one}}) for one, two in swapped
    ]
    rest = {n: s for n, s in source_of.items() if source_of.get(s) != n}
    if rest:
        twice = {n: s for n, s in rest.items() if s not in rest}
        kind = "duplicated" if len(twice) == len(rest) else "exchanged"
        pairs = [f"{n} holds {s}" for n, s in rest.items()]
        also = ", which is also in its own place" if kind == "duplicated" else ""
        told.append((kind, listed(pairs, separator="; ") + also, list(rest), {"from": rest}))
    return told


def _name(layer: int | None, klass: str) -> str:
    return klass if layer is None else f"blk.{layer}.{klass}"
