"""Layers that carry a state from token to token: short convolutions, selective scans and delta rules, token by token.

Each function is the recurrence as its paper defines it, one step per token in the inputs' own dtype; the parallel and
chunked forms that make training fast give the same numbers up to rounding and are not used. Every chunk starts with a
state of zeros. Shapes: B batch, T tokens, C channels, H heads, P head size, N or K state size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    state = x.new_zeros(x.shape[0], x.shape[2], a.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        state = torch.exp(step * a) * state + step * x[:, t, :, None] * b[:, t, None, :]
        outputs.append((state @ c[:, t, :, None])[..., 0])
    return torch.stack(outputs, dim=1) + x * d


def head_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Mamba 2's recurrence (Dao and Gu, 2024): one decay for all of a head; [B, T, H, P].

    x [B, T, H, P], dt [B, T, H], a and d [H], b and c [B, T, G, N]; group g serves the H / G neighbouring heads from
    g H / G on: h_t = exp(dt_t a) h_{t-1} + dt_t x_t ⊗ b_t, y_t = h_t c_t + d x_t.
    """
    n_batch, n_tokens, n_head, size = x.shape
    group = n_head // b.shape[2]
    b, c = b.repeat_interleave(group, dim=2), c.repeat_interleave(group, dim=2)  # [B, T, H, N]
    decay, scaled = torch.exp(dt * a), x * dt[..., None]
    state = x.new_zeros(n_batch, n_head, size, b.shape[-1])
    outputs = []
    for t in range(n_tokens):
        state = decay[:, t, :, None, None] * state + scaled[:, t, :, :, None] * b[:, t, :, None, :]
        outputs.append((state @ c[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, dim=1) + x * d[:, None]


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule (Yang, Kautz and Hatamizadeh, 2024; with a decay per key component Kimi Delta Attention).

    q and k [B, T, H, K], v [B, T, H, V], log_decay [B, T, H] or [B, T, H, K], beta [B, T, H]; [B, T, H, V]. The state
    S [K, V] of a head is a memory of values by keys. It fades, what it holds for the token's key is moved to the
    token's value by the share beta, and the query reads it:
    S' = exp(log_decay_t) S_{t-1}, S_t = S' + k_t ⊗ beta_t (v_t - S'ᵀ k_t), o_t = S_tᵀ q_t.
    """
    n_batch, n_tokens, n_head, _ = q.shape
    decay = torch.exp(log_decay if log_decay.dim() == 4 else log_decay[..., None])[..., None]  # [B, T, H, K or 1, 1]
    state = q.new_zeros(n_batch, n_head, q.shape[-1], v.shape[-1])
    outputs = []
    for t in range(n_tokens):
        state = state * decay[:, t]
        held = (k[:, t, :, None, :] @ state)[..., 0, :]  # [B, H, V]
        change = beta[:, t, :, None] * (v[:, t] - held)
        state = state + k[:, t, :, :, None] * change[..., None, :]
        outputs.append((q[:, t, :, None, :] @ state)[..., 0, :])
    return torch.stack(outputs, dim=1)
