"""Softmax with mask, ALiBi and sinks, and flash attention.

By ggml.h and ggml-cpu/ops.cpp. Softmax and most of flash attention are computed in float32, the sums in float64.
One path of flash attention is coarser by design and followed step by step: with fewer than 64 queries (so for single
tokens), the query is rounded to the type that the keys' dot product takes, and values of F16 are accumulated in
float16, key by key (`_in_halves`). From 512 keys on a single query's keys are divided among the threads, each with
an accumulator of its own. The order is that of the CPU backend on x86; ARM's vector units multiply in float16, too.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from diffharness.replay.activation_quant import VEC_DOT_TYPE, arithmetics, as_held
from diffharness.replay.call import Call, Kernel
from diffharness.replay.matmul import Rows, nearest

_TILE = 64  # queries; from here on flash attention works on tiles, in float32 throughout
_SPLIT_FROM = 512  # keys of a single query, from which on they are divided among the threads
_PLAIN = ("F32", "F16")
_ROOM = 1 << 23  # scores held at a time: 32 MiB


def slopes(n_head: int, max_bias: float) -> Tensor:
    """ALiBi's factor of the mask for each head [n_head]; ones without a bias."""
    if max_bias <= 0.0:
        return torch.ones(n_head)
    n_log2 = 1 << (n_head.bit_length() - 1)
    m0, m1 = (np.float32(2.0 ** float(np.float32(-bias) / np.float32(n_log2))) for bias in (max_bias, max_bias / 2))
    powers = [float(m0) ** (h + 1) if h < n_log2 else float(m1) ** (2 * (h - n_log2) + 1) for h in range(n_head)]
    return torch.tensor(powers, dtype=torch.float32)


class _Bias:
    """The mask of a node, if it has one, times ALiBi's slopes. Its rows beyond the queries are padding."""

    def __init__(self, call: Call, slot: int, n_rows: int, n_head: int, max_bias: float) -> None:
        self._mask = call.x(slot)[:, :, :n_rows] if call.has(slot) else None
        self._slopes = slopes(n_head, max_bias)[:, None, None] if max_bias > 0.0 else None

    def add_to(self, scores: Tensor, heads: slice) -> None:
        """To scores [ne3, heads, rows, keys] of some of the heads. Masks repeat over heads and batches."""
        if self._mask is None:
            return
        n_batch, n_head = self._mask.shape[:2]
        batch, head = torch.arange(scores.shape[0]) % n_batch, torch.arange(heads.start, heads.stop) % n_head
        mask = self._mask if n_head == 1 else self._mask[:, head]
        mask = mask if n_batch == 1 else mask[batch]
        scores += mask if self._slopes is None else mask * self._slopes[heads]


def _soft_max(call: Call) -> Tensor:
    """softmax(x · scale + slope · mask) along rows; a sink [heads] takes its share and gives nothing."""
    x, scale, max_bias = call.x(0), call.f(0), call.f(1)
    n_head, n_rows = x.shape[1:3]
    scores = x.mul_(scale)
    _Bias(call, 1, n_rows, n_head, max_bias).add_to(scores, slice(0, n_head))
    top = scores.amax(-1, keepdim=True)
    sink = call.x(2).reshape(-1, 1, 1) if call.has(2) else None
    if sink is not None:
        top = torch.maximum(top, sink)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    if sink is not None:
        total += torch.exp(sink - top)
    return weights.mul_(total.reciprocal().float())


# -- flash attention -----------------------------------------------------------------------------------


def _flash_attention(call: Call) -> Tensor:
    """softmax(q · k · scale, capped, masked) · v: [ne3, queries, heads, DV] of q [ne3, heads, queries, DK].

    Heads of q share those of k and v in blocks. op_params: scale, ALiBi's bias, logit softcap, precision.
    """
    (n_batch, _, n_queries, _), n_keys = call.value(0).shape, call.value(1).shape[2]
    types = [call.value(i).type for i in range(3)]
    plain = types[0] == "F32" and types[1] == types[2] and types[1] in _PLAIN
    tiled = plain and n_queries >= _TILE
    held = "F32" if tiled else VEC_DOT_TYPE[types[1]]
    split = plain and n_batch == n_queries == 1 and n_keys >= _SPLIT_FROM
    n_parts = (call.node.n_threads if split else 1) if types[2] == "F16" and not tiled else None
    return nearest(call, lambda arithmetic: _attended(call, held, arithmetic, n_parts), arithmetics(held))


def _attended(call: Call, held: str, arithmetic: str, n_parts: int | None) -> Tensor:
    """The output with queries as `held`; accumulated in float16 where there is a number of parts."""
    scale, max_bias, cap = call.f(0), call.f(1), call.f(2)
    q, v = as_held(call.x(0), held, arithmetic), call.x(2)
    k = _with_minima(call, 1) if held == "Q8_1" else call.x(1)
    n_batch, n_head, n_queries, _ = q.shape
    bias = _Bias(call, 3, n_queries, n_head, max_bias)
    sinks = call.x(4).reshape(-1, 1, 1) if call.has(4) else None
    out = torch.empty(n_batch, n_queries, n_head, v.shape[-1])
    step = max(1, _ROOM // (n_batch * n_queries * k.shape[2]))
    for first in range(0, n_head, step):
        heads = slice(first, min(first + step, n_head))
        scores = q[:, heads] @ _of_heads(k, heads, n_head, n_batch).transpose(-1, -2)
        scores *= float(np.float32(scale) / np.float32(cap)) if cap else scale
        if cap:
            scores = scores.tanh_().mul_(cap)
        bias.add_to(scores, heads)
        values, sink = _of_heads(v, heads, n_head, n_batch), None if sinks is None else sinks[heads]
        summed = _in_floats(scores, values, sink) if n_parts is None else _in_halves(scores, values, sink, n_parts)
        out[:, :, heads] = summed.transpose(1, 2)
    return out


def _with_minima(call: Call, i: int) -> Tensor:
    """Source i with the minima of each row's blocks as further columns."""
    rows = Rows(call, i)
    n3, n2 = rows.shape[:2]
    matrices = [torch.cat([piece for _, _, piece in rows.pieces(i3, i2)]) for i3 in range(n3) for i2 in range(n2)]
    return torch.stack(matrices).reshape(n3, n2, rows.shape[2], -1)


def _of_heads(t: Tensor, heads: slice, n_head: int, n_batch: int) -> Tensor:
    """Keys or values [ne3, kv heads, keys, D] for some heads of q, and for its batches."""
    t = t[:, torch.arange(heads.start, heads.stop) // (n_head // t.shape[1])]
    return t.repeat_interleave(n_batch // t.shape[0], dim=0)


def _in_floats(scores: Tensor, v: Tensor, sink: Tensor | None) -> Tensor:
    """The weighted sum of the values in float32; zero where nothing is seen."""
    top = _top(scores, sink)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    if sink is not None:
        total += torch.exp(sink - top)
    return (weights @ v) * torch.where(total == 0, 0.0, total.reciprocal()).float()


def _top(scores: Tensor, sink: Tensor | None) -> Tensor:
    """The greatest score of each row, finite also of rows that see nothing."""
    top = scores.amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink)
    return torch.where(top == -math.inf, 0.0, top)


def _in_halves(scores: Tensor, v: Tensor, sink: Tensor | None, n_parts: int) -> Tensor:
    """The same with accumulators in float16, one for each of `n_parts` runs of keys."""
    step = -(-scores.shape[-1] // n_parts)
    top = _top(scores, sink)
    out, total = torch.zeros(*scores.shape[:-1], v.shape[-1]), torch.zeros_like(top)
    for part, values in zip(torch.split(scores, step, -1), torch.split(v, step, -2), strict=True):
        held, weight, highest = _accumulated(part, values)
        share = torch.exp(highest - top)
        out, total = out + held * share, total + weight * share
    if sink is not None:
        total = total + torch.exp(sink - top)
    return out * torch.where(total == 0, 0.0, 1.0 / total)


def _accumulated(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Key after key: the accumulator [.., DV], the sum of the weights [.., 1] and the greatest score [.., 1].

    When a key's score exceeds those before, the accumulator is multiplied by what that takes off its weight; then the
    key's value is added with its weight. Each of both steps is rounded to float16. Keys that nobody sees are skipped.
    """
    seen = (scores != -math.inf).flatten(0, -2).any(0).nonzero().squeeze(-1)
    scores, v = scores[..., seen], v[..., seen, :]
    nothing = torch.full((*scores.shape[:-1], 1), -math.inf)
    best = torch.cat((nothing, scores.cummax(-1).values), dim=-1)
    before, best = best[..., :-1], best[..., 1:]
    fade = torch.where(scores > before, torch.exp(before - scores), 1.0)
    weight = torch.where(scores == -math.inf, 0.0, torch.exp(scores - best))
    fades = (fade < 1.0).flatten(0, -2).any(0).tolist()
    held, total = torch.zeros(*nothing.shape[:-1], v.shape[-1]), torch.zeros_like(nothing)
    for key in range(len(seen)):
        fading, share = fade[..., key, None], weight[..., key, None]
        if fades[key]:
            held, total = (held * fading).half().float(), total * fading
        held, total = torch.addcmul(held, v[..., None, key, :], share).half().float(), total + share
    return held, total, best[..., -1:] if len(seen) else nothing


KERNELS: dict[str, Kernel] = {"SOFT_MAX": _soft_max, "FLASH_ATTN_EXT": _flash_attention}
