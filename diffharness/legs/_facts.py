"""What is known of a divergence that nothing explains: ratios, rotation, heads, rank of the error, tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffharness.engine.nodes import table_for
from diffharness.layers import ranges
from diffharness.legs._trials import LocalTrials
from diffharness.records import TapRow
from diffharness.records.explain import Facts
from diffharness.reference.hypotheses import Place, Scene
from diffharness.reference.hypotheses._fit import ratio
from diffharness.reference.hypotheses.rope import TURNED
from diffharness.reference.hypotheses.rope_fitted import measure
from diffharness.reference.local import Chunk
from diffharness.reference.steps import Steps
from diffharness.row_sums import QUIET_SHARE
from diffharness.taps import graph_order, layer_tap
from diffharness.words import listed

_ENERGY = 0.99
_PAIRS = 16  # whose angles are told
_NODES = 6  # of llama.cpp that are told
_WIDEST = 4096  # columns of the error whose rank is counted: more tell no more


def facts_of(trials: LocalTrials, model: Steps, place: Place, first: TapRow, chunks: Sequence[Chunk]) -> Facts:
    """The facts of the first failing tap, over the first chunk that fails."""
    scene = trials.scene(model, place, first.tap, chunks[0])
    ours, engine = scene.ours[scene.tap].double(), scene.engine[scene.tap].double()
    error = (engine - ours).nan_to_num(0.0, 0.0, 0.0)
    floor = first.floor or 0.0
    rank, of = _rank(error)
    power = ours.square().sum(dim=1)
    token_error = error.square().sum(dim=1) / power.clamp_min(QUIET_SHARE * float(power.median()) + 1e-30)
    wrong = int((token_error > floor).sum())
    heads, n_heads = _heads(scene, error, ours, floor)
    ratios = {
        name: ratio(scene.engine[name], scene.ours[name])
        for name in sorted(scene.engine, key=lambda name: graph_order(layer_tap(0, name)))
    }
    facts = Facts(
        tap=first.tap,
        ratios=ratios,
        rotation=_rotation(scene),
        heads=heads,
        n_heads=n_heads,
        rank=rank,
        rank_of=of,
        tokens=wrong,
        tokens_of=len(error),
    )
    return facts.model_copy(update={"words": _words(facts, scene, token_error > floor)})


def _rank(error: Tensor) -> tuple[int, int]:
    """Singular values that hold 99 % of the energy of [tokens, width], and how many there are."""
    if error.shape[1] > _WIDEST:
        error = error[:, :: error.shape[1] // _WIDEST + 1]
    values = torch.linalg.svdvals(error).square()
    total = float(values.sum())
    if total == 0:
        return 0, len(values)
    return int((values.cumsum(0) < _ENERGY * total).sum()) + 1, len(values)


def _heads(scene: Scene, error: Tensor, ours: Tensor, floor: float) -> tuple[list[int], int | None]:
    """Heads above the floor, and how many there are, where the tap has heads."""
    name = scene.tap.removesuffix("_rope").removesuffix("_norm")
    n = None
    if scene.tap == "attn_ctx" and scene.qkv is not None:
        n = scene.qkv[0].shape[2]
    elif name in scene.heads:
        n = scene.heads[name].shape[2]
    elif name == "attn_v" and scene.qkv is not None:
        n = scene.qkv[2].shape[2]
    if n is None or error.shape[1] % n:
        return [], None
    by_head = error.reshape(len(error), n, -1).square().sum(dim=(0, 2))
    power = ours.reshape(len(ours), n, -1).square().sum(dim=(0, 2)).clamp_min(1e-30)
    return torch.nonzero(by_head / power > floor).flatten().tolist(), n


def _rotation(scene: Scene) -> dict[str, list[float]]:
    found = {}
    if scene.tap in TURNED:
        for name in ("attn_q", "attn_k"):
            measured = measure(scene, name)
            if measured is not None:
                share = measured[0].frequency / measured[1].clamp_min(1e-30)
                found[name] = [float(value) for value in share[:_PAIRS]]
    return found


def _words(facts: Facts, scene: Scene, wrong: Tensor) -> list[str]:
    words = [f"{facts.tap} is {facts.ratios[scene.tap]:.4g} times the reference's by least squares"]
    share = "all" if facts.tokens == facts.tokens_of else f"{facts.tokens} of {facts.tokens_of}"
    first = int(torch.nonzero(wrong).flatten()[0]) if bool(wrong.any()) else 0
    words.append(f"{share} tokens are off" + (f", the first at position {first}" if first else ""))
    if facts.n_heads is not None:
        same = len(facts.heads) == facts.n_heads
        words.append("all heads are" if same else f"of {facts.n_heads} heads {ranges(facts.heads) or 'none'}")
    words.append(f"{facts.rank} of {facts.rank_of} singular values hold 99 % of the error")
    for name, values in facts.rotation.items():
        text = ", ".join(f"{value:.4g}" for value in values[:4])
        words.append(f"{name} turned at {text}, ... of the model's frequencies")
    return [*words, *_where(facts.tap, scene)]


def _where(tap: str, scene: Scene) -> list[str]:
    """Between which of llama.cpp's nodes the difference arises."""
    order = graph_order(tap)
    names = [layer_tap(scene.il, name) if scene.in_layer else name for name in scene.engine]
    agreeing = max((name for name in names if graph_order(name) < order), key=graph_order, default=None)
    table = table_for(str(scene.metadata.get("general.architecture")))
    nodes = listed(table.holders(tap, scene.weights.has), _NODES)
    last = [f"the last tap before it that agrees is {agreeing}"] if agreeing else []
    return [*last, *([f"llama.cpp makes {tap} in {nodes}"] if nodes else [])]
