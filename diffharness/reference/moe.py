"""Routed experts: which of them a token goes to, with what weight, and what they make of it.

Shapes: B batch, T tokens, E width of the residual stream; `...` any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffharness.reference.model import Weights
from diffharness.reference.ops import linear

Gating = Literal["softmax", "sigmoid", "softmax_of_chosen", "sqrt_softplus"]

# What makes scores of all experts from the router's logits.
SCORES: dict[Gating, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "softmax_of_chosen": lambda logits: logits,  # the softmax is taken over the chosen ones only
    "sqrt_softplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}

GATING: dict[int, Gating] = {1: "softmax", 2: "sigmoid", 3: "softmax_of_chosen", 4: "sqrt_softplus"}
"""GGUF's `expert_gating_func`."""


def route(
    logits: Tensor,
    n_used: int,
    *,
    normalise: bool,
    gating: Gating = "softmax",
    bias: Tensor | None = None,
    scale: float = 1.0,
    n_group: int = 1,
    n_group_used: int = 1,
    sum_floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The `n_used` experts of highest score and their weights, both [..., n_used], highest first.

    `logits` [..., n_expert]. `bias` [n_expert] is added for the choice only. With more than one group, the choice is
    among the `n_group_used` groups whose two best experts score highest together (DeepSeek V3). With `normalise` the
    weights are divided by their sum, or by `sum_floor` where that is more; then comes `scale`. Equal scores go to the
    lower expert.
    """
    scores = SCORES[gating](logits)
    chosen_by = scores if bias is None else scores + bias
    if n_group > 1:
        chosen_by = _of_best_groups(chosen_by, n_group, n_group_used)
    experts = chosen_by.sort(dim=-1, descending=True, stable=True).indices[..., :n_used]
    weights = scores.gather(-1, experts)
    if gating == "softmax_of_chosen":
        weights = weights.softmax(dim=-1)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=sum_floor)
    return weights * scale if scale != 1.0 else weights, experts


def _of_best_groups(scores: Tensor, n_group: int, n_used: int) -> Tensor:
    """Scores with those of all but the best groups at -inf."""
    groups = scores.reshape(*scores.shape[:-1], n_group, -1)  # [..., n_group, experts of a group]
    together = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
    best = together.sort(dim=-1, descending=True, stable=True).indices[..., :n_used]
    kept = torch.zeros_like(together, dtype=torch.bool).scatter(-1, best, True)
    return groups.masked_fill(~kept[..., None], -math.inf).flatten(-2)


def mix(x: Tensor, weights: Tensor, experts: Tensor, ffn: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The weighted sum of each token's experts: x [B, T, E], weights and experts [B, T, n_used]; [B, T, E].

    `ffn(expert, x[n, E])` is called once for every expert that some token was routed to, with those tokens only.
    """
    flat = x.reshape(-1, x.shape[-1])
    n_used = experts.shape[-1]
    chosen, by_expert = experts.flatten().sort(stable=True)
    tokens, shares = by_expert // n_used, weights.flatten()[by_expert, None]
    present, counts = torch.unique_consecutive(chosen, return_counts=True)
    out, start = torch.zeros_like(flat), 0
    for expert, count in zip(present.tolist(), counts.tolist(), strict=True):
        some = slice(start, start + count)
        rows = tokens[some]
        out.index_add_(0, rows, ffn(expert, flat.index_select(0, rows)) * shares[some])
        start += count
    return out.reshape(x.shape)


def matrix(w: Weights, name: str, expert: int) -> Tensor:
    """One expert's matrix [out, in], or vector, of the stack `name` [n_expert, ...]; no other expert is read."""
    return w.rows(name, slice(expert, expert + 1))[0]


def project(w: Weights, name: str, expert: int, x: Tensor) -> Tensor:
    """x[..., in] times one expert's matrix of `name`.weight, with its `.scale` and `.bias` where there are such."""
    weight = matrix(w, name + ".weight", expert)
    bias = matrix(w, name + ".bias", expert) if w.has(name + ".bias") else None
    if w.has(name + ".scale"):
        y = linear(x, weight) * w.get(name + ".scale")[expert]
        return y if bias is None else y + bias
    return linear(x, weight, bias)
