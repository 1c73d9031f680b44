"""Tensors used otherwise than the file says: biases and factors left out or in another order, rows permuted,
another layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from diffharness.reference.hypotheses._altering import Alteration, Seen, seeing, viewing
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.model import Weights
from diffharness.taps import split

PROJECTED = {
    "attn_q_a": "attn_q_a",
    "attn_q_b": "attn_q",
    "attn_kv_a_mqa": "attn_kv_a",
    "attn_qkv": "attn_qkv",
    "attn_q": "attn_q",
    "attn_k": "attn_k",
    "attn_v": "attn_v",
    "attn_gate": "attn_gate",
    "ssm_in": "ssm_in",
    "ssm_conv1d": "ssm_conv",
    "ssm_x": "ssm_x",
    "ssm_dt": "ssm_dt",
    "ssm_beta": "ssm_beta",
    "ssm_out": "ssm_out",
    "attn_output": "attn_out",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_down": "ffn_out",
    "ffn_gate_inp": "moe_logits",
    "ffn_gate_exps": "moe_experts",
    "ffn_up_exps": "moe_experts",
    "ffn_down_exps": "moe_experts",
    "ffn_gate_shexp": "ffn_shexp",
    "ffn_up_shexp": "ffn_shexp",
    "ffn_down_shexp": "ffn_shexp",
}
"""Matrices of a layer, and where what they give may be seen first."""

QK = frozenset({"attn_q", "attn_k"})

Order = Callable[[int, int], Tensor]
"""Which of its own rows each row of a matrix of n is, by layer and n."""


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on tensors that are read wrongly."""
    if scene.place == "head":
        yield from _head(scene)
    if not scene.in_layer:
        return
    present = {stem: tap for stem, tap in PROJECTED.items() if scene.has(f"{stem}.bias")}
    if present:
        yield Hypothesis("bias.absent", "biases were left out", frozenset(present.values()), _without(set(present)))
        groups = {
            frozenset(s for s in present if s.startswith(part)): words for part, words in reversed(_PARTS.items())
        }
        for group, words in groups.items():
            if 1 < len(group) < len(present):
                taps = frozenset(present[stem] for stem in group)
                yield Hypothesis("bias.absent", f"biases{words} were left out", taps, _without(group))
        for stem, tap in present.items():
            if len(present) > 1:
                yield Hypothesis("bias.absent", f"{stem}.bias were left out", frozenset({tap}), _without({stem}))
        doubled = seeing(change=lambda name, value: 2 * value if name.endswith(".bias") else value)
        yield Hypothesis("bias.twice", "biases were added twice", frozenset(present.values()), doubled)
    yield from _scales(scene)
    yield from _rows(scene)
    yield from _neighbours(scene)


def _head(scene: Scene) -> Iterator[Hypothesis]:
    """The bias of the logits, which few models have."""
    if scene.weights.has("output.bias"):
        logits = frozenset({"logits"})
        yield Hypothesis("bias.absent", "output.bias were left out", logits, _without({"output"}))
        twice = seeing(change=lambda name, value: 2 * value if name == "output.bias" else value)
        yield Hypothesis("bias.twice", "output.bias were added twice", logits, twice)


def _scales(scene: Scene) -> Iterator[Hypothesis]:
    """The factor that a matrix may have beside it, `<matrix>.scale`: of the product alone, before any bias."""
    for words, stems, taps in _groups(scene, PROJECTED, "scale"):
        yield Hypothesis("scale.absent", f"{words} were left out", taps, seeing(change=_unscaled(stems)))
    dense = [stem for stem in PROJECTED if not stem.endswith("_exps")]  # experts' biases are read by expert
    for words, stems, taps in _groups(scene, dense, "scale", "bias"):
        says = f"{words} multiplied what biases had been added to, and not the product alone"
        yield Hypothesis("scale.after-bias", says, taps, _scaled_with_bias(stems))


_PARTS = {
    ("ffn_",): " of the feed-forward's matrices",
    ("attn_",): " of attention's matrices",
    ("attn_", "ssm_"): " of mixers' matrices",
    ("",): "",
}


def _groups(scene: Scene, stems: Collection[str], *kinds: str) -> Iterator[tuple[str, frozenset[str], frozenset[str]]]:
    """Factors that may be used wrongly together: of a part of each layer, all of them, each by itself.

    In words, as matrices, and where they show in this layer; `kinds` are what a matrix must have beside it.
    """

    def have(il: int) -> frozenset[str]:
        return frozenset(s for s in stems if all(scene.weights.has(f"blk.{il}.{s}.{kind}") for kind in kinds))

    here, anywhere = have(scene.il), frozenset[str]().union(*map(have, range(scene.model.n_layer)))
    groups: dict[frozenset[str], str] = {}
    for part, words in _PARTS.items():
        group = frozenset(stem for stem in anywhere if stem.startswith(part))
        groups.setdefault(group, f"the factors beside matrices (.scale){words}")
    for stem in stems:
        groups.setdefault(frozenset({stem}), f"the factors {stem}.scale")
    for group, words in groups.items():
        taps = frozenset(PROJECTED[stem] for stem in group & here)
        if taps:
            yield words, group, taps


def _unscaled(stems: frozenset[str]) -> Callable[[str, Tensor], Tensor]:
    def change(name: str, value: Tensor) -> Tensor:
        stem, _, kind = split(name)[1].rpartition(".")
        return torch.ones_like(value) if kind == "scale" and stem in stems else value

    return change


def _scaled_with_bias(stems: frozenset[str]) -> Alteration:
    """s (W x + b) in place of s W x + b."""

    def view(w: Weights) -> Weights:
        def change(name: str, value: Tensor) -> Tensor:
            matrix, _, kind = name.rpartition(".")
            meant = kind == "bias" and split(matrix)[1] in stems
            scale = w.find(matrix + ".scale") if meant else None
            return value if scale is None else value * scale

        return Seen(w, change=change)

    return viewing(view)


def _without(stems: Collection[str]) -> Alteration:
    def change(name: str, value: Tensor) -> Tensor:
        stem, _, kind = split(name)[1].rpartition(".")
        return torch.zeros_like(value) if kind == "bias" and stem in stems else value

    return seeing(change=change)


# -- order of rows ------------------------------------------------------------------------------------


def interleaved(n: int) -> Tensor:
    """Half-split order of n components read as interleaved pairs: 0, n/2, 1, n/2 + 1, ..."""
    return torch.arange(n).reshape(2, n // 2).T.flatten()


def _rows(scene: Scene) -> Iterator[Hypothesis]:
    heads = {name: scene.heads[name].shape[-2:] for name in QK if name in scene.heads}
    if len(heads) < 2 or scene.tap not in QK:
        return
    usual = heads["attn_q"][1]

    def size(il: int) -> int:
        """Components of a head of layer `il`, which may differ between kinds of layers."""
        norm = f"blk.{il}.attn_q_norm.weight"
        return scene.weights.n_rows(norm) if scene.weights.has(norm) else usual

    def in_heads(order: Callable[[int], Tensor]) -> Order:
        return lambda il, n: (torch.arange(0, n, size(il))[:, None] + order(size(il))[None, :]).flatten()

    def of_heads(back: bool) -> Order:
        def order(il: int, n: int) -> Tensor:
            n_head, n_kv = n // size(il), scene.weights.n_rows(f"blk.{il}.attn_k.weight") // size(il)
            turned = torch.arange(n_head).reshape(n_kv, n_head // n_kv).T.flatten()
            turned = turned.argsort() if back else turned
            return (turned[:, None] * size(il) + torch.arange(size(il))[None, :]).flatten()

        return order

    orders: tuple[tuple[str, Callable[[int], Tensor]], ...] = (
        ("interleaved", interleaved),
        ("half-split", lambda n: interleaved(n).argsort()),
    )
    for words, order in orders if usual % 2 == 0 else ():
        for stems in (QK, frozenset({"attn_q"}), frozenset({"attn_k"})):
            says = (
                f"the rows of {' and '.join(sorted(stems, reverse=True))} were permuted to {words} pairs once too often"
            )
            yield Hypothesis("rows.pairs", says, stems, _permuted(stems, in_heads(order)))
    if 1 < heads["attn_k"][0] < heads["attn_q"][0]:
        for back, words in ((False, "by their number within a group first"), (True, "by their group first")):
            says = f"the query heads were sorted once more, {words}"
            one = frozenset({"attn_q"})
            yield Hypothesis("rows.heads", says, one, _permuted(one, of_heads(back)))


def _permuted(stems: frozenset[str], order: Order) -> Alteration:
    def change(name: str, value: Tensor) -> Tensor:
        il, rest = split(name)
        if il is None or rest.rpartition(".")[0] not in stems or rest.endswith(".scale"):
            return value
        return value[order(il, len(value)).to(value.device)]

    return seeing(change=change)


# -- other layers -------------------------------------------------------------------------------------


def _neighbours(scene: Scene) -> Iterator[Hypothesis]:
    """The diverging layer with the weights of the layer before or after it, where these fit."""
    for by, words in ((1, "the next layer's"), (-1, "the previous layer's")):
        other = scene.il + by
        if not 0 <= other < scene.model.n_layer or scene.model.layer_kind(other) != scene.model.layer_kind(scene.il):
            continue
        says = f"layers used {words} weights"
        yield Hypothesis(
            "weights.neighbour", says, frozenset({scene.tap}), seeing(rename=_shifted(by, scene.model.n_layer))
        )


def _shifted(by: int, n_layer: int) -> Callable[[str], str]:
    def rename(name: str) -> str:
        layer, rest = split(name)
        return name if layer is None or not 0 <= layer + by < n_layer else f"blk.{layer + by}.{rest}"

    return rename
