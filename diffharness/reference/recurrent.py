"""Layers that carry a state from token to token: short convolutions, selective scans and delta rules.

Each docstring has the recurrence as its paper defines it. Where a head has one decay, the recurrence is solved for a
block of tokens at once, in products of matrices: what a token leaves to a later one of its block is a weight between
the two, and the state is carried from block to block. That is the same sum in another order; the tests hold it against
the recurrence token by token. Decays are summed up in float64, so that differences of large sums keep their digits.
Every chunk of text starts with a state of zeros.
Shapes: B batch, T tokens, C channels, H heads, P head size, N or K state size, V value size, L tokens of a block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 64  # tokens solved at once where a head has one decay
_SCAN_BLOCK = 4  # tokens whose decays are made at once where each channel has a state of its own; more leave the cache


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each channel of x [B, T, C] convolved along tokens with its own weight [C, K], plus bias [C]; [B, T, C].

    The last weight of a channel is its token's own; tokens before the first are zeros.
    """
    kernel = weight.shape[-1]
    padded = F.pad(x.transpose(1, 2), (kernel - 1, 0))
    return F.conv1d(padded, weight[:, None, :], bias, groups=x.shape[-1]).transpose(1, 2)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(Σ x² + eps) over the last axis."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)


def grouped_rms_norm(x: Tensor, weight: Tensor, eps: float, n_group: int) -> Tensor:
    """RMSNorm of each of `n_group` equal parts of the last axis by itself, times weight [the whole axis]."""
    parts = x.reshape(*x.shape[:-1], n_group, -1)
    parts = parts * torch.rsqrt(parts.square().mean(dim=-1, keepdim=True) + eps)
    return parts.reshape(x.shape) * weight.reshape(-1)


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Mamba's recurrence (Gu and Dao, 2023, algorithm 2): every channel with a state of its own; [B, T, C].

    x and dt [B, T, C], a [C, N] (negative), b and c [B, T, N], d [C]:
    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t, y_t = h_t · c_t + d x_t.
    """
    a, scaled = a.T.contiguous(), dt * x
    state = x.new_zeros(x.shape[0], *a.shape)  # [B, N, C]: products run along channels, the longer axis
    outputs = []
    for start in range(0, x.shape[1], _SCAN_BLOCK):
        block = slice(start, start + _SCAN_BLOCK)
        decays = torch.exp(dt[:, block, None, :] * a).unbind(1)
        added = (b[:, block, :, None] * scaled[:, block, None, :]).unbind(1)
        for decay, more, read in zip(decays, added, c[:, block, None, :].unbind(1), strict=True):
            state = torch.addcmul(more, decay, state)
            outputs.append(read @ state)
    return torch.cat(outputs, dim=1) + x * d


def head_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Mamba 2's recurrence (Dao and Gu, 2024): one decay for all of a head; [B, T, H, P].

    x [B, T, H, P], dt [B, T, H], a and d [H], b and c [B, T, G, N]; group g serves the H / G neighbouring heads from
    g H / G on: h_t = exp(dt_t a) h_{t-1} + dt_t x_t ⊗ b_t, y_t = h_t c_t + d x_t.
    """
    n_batch, n_tokens, n_head, size = x.shape
    n_group = b.shape[2]
    by_group = (n_batch, n_group, n_head // n_group)
    log_decay = (dt * a).transpose(1, 2).reshape(*by_group, n_tokens)
    values = (x * dt[..., None]).transpose(1, 2).reshape(*by_group, n_tokens, size)
    keys, queries = (y.transpose(1, 2).unsqueeze(2) for y in (b, c))  # [B, G, 1, T, N]
    state = x.new_zeros(*by_group, b.shape[-1], size)
    outputs = []
    for start in range(0, n_tokens, _BLOCK):
        block = slice(start, start + _BLOCK)
        k, q, v = keys[..., block, :], queries[..., block, :], values[..., block, :]
        from_start, between, to_end = _decays(log_decay[..., block])
        outputs.append((q @ k.mT * between) @ v + q @ state * from_start)
        state = state * from_start[..., -1:, :] + (k * to_end).mT @ v
    y = torch.cat(outputs, dim=-2).flatten(1, 2).transpose(1, 2)
    return y + x * d[:, None]


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule (Yang, Kautz and Hatamizadeh, 2024; with a decay per key component Kimi Delta Attention).

    q and k [B, T, H, K], v [B, T, H, V], log_decay [B, T, H] or [B, T, H, K], beta [B, T, H]; [B, T, H, V]. The state
    S [K, V] of a head is a memory of values by keys. It fades, what it holds for the token's key is moved to the
    token's value by the share beta, and the query reads it:
    S' = exp(log_decay_t) S_{t-1}, S_t = S' + k_t ⊗ beta_t (v_t - S'ᵀ k_t), o_t = S_tᵀ q_t.

    Of a block, the changes D_t = beta_t (v_t - S'ᵀ k_t) depend on those before them linearly: with w_ts what is left of
    k_s for k_t, D_t + beta_t Σ_{s<t} w_ts D_s = beta_t (v_t - what the state before the block holds for k_t).
    """
    if log_decay.dim() == 4:  # a weight for every pair of tokens and every component would be more work
        return _delta_rule_by_token(q, k, v, log_decay.exp(), beta)
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta[..., None]))  # [B, H, T, ...]
    log_decay = log_decay.transpose(1, 2)
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    for start in range(0, q.shape[2], _BLOCK):
        block = slice(start, start + _BLOCK)
        queries, keys, values, share = (x[:, :, block] for x in (q, k, v, beta))
        from_start, between, to_end = _decays(log_decay[:, :, block])
        told = share * (values - keys @ state * from_start)
        # `unitriangular` takes the diagonal for ones, and what is above it is not looked at.
        among = share * (keys @ keys.mT) * between
        changes = torch.linalg.solve_triangular(among, told, upper=False, unitriangular=True)
        outputs.append(queries @ state * from_start + (queries @ keys.mT * between) @ changes)
        state = state * from_start[..., -1:, :] + (keys * to_end).mT @ changes
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _delta_rule_by_token(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The delta rule as its definition goes; `decay` [B, T, H, K]."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[-1], v.shape[-1])
    outputs = []
    for query, key, value, left, share in zip(*(x.unbind(1) for x in (q, k, v, decay, beta)), strict=True):
        state = state * left[..., None]
        change = share[..., None] * (value - (key[..., None, :] @ state)[..., 0, :])
        state = torch.addcmul(state, key[..., None], change[..., None, :])
        outputs.append((query[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, dim=1)


def _decays(log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of a state within a block, by log_decay [..., L] of every token.

    At each token of the state before the block [..., L, 1]; at token t of what token s wrote [..., L (t), L (s)], 0 for
    s > t; after the block of what each token wrote [..., L, 1].
    """
    total = log_decay.double().cumsum(dim=-1)
    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).to(log_decay.dtype).masked_fill(later, -math.inf)
    to_end = total[..., -1:] - total
    return total[..., None].to(log_decay.dtype).exp(), between.exp(), to_end[..., None].to(log_decay.dtype).exp()
