"""The recurrences of RWKV 6 and 7, by the definitions in ggml.h and ggml-cpu/ops.cpp.

All inputs are [n_tokens, n_head, S], the tokens of the first sequence first; states are [n_seqs, n_head, S, S].
Computed in float64, one token after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffharness.replay.call import Call, Kernel, Partial
from diffharness.replay.recurrent import by_sequence, run


def _wkv6(call: Call) -> Tensor | Partial:
    """out = rᵀ (state + first · k ⊗ v); state ← state · decay + k ⊗ v, rows of the state by key channel.

    `first` [n_head, S] weighs the token's own part; `decay` is the token's, per key channel.
    """
    states = call.x(5).double()[0, 0]
    k, v, r, decay = (by_sequence(call.x(i), len(states)) for i in (0, 1, 2, 4))
    n_head, size = k.shape[2:]
    first = call.x(3).double().reshape(n_head, size, 1)

    def step(state: Tensor, t: int) -> Tensor:
        own = k[:, t, :, :, None] * v[:, t, :, None, :]
        out = torch.einsum("shk,shkv->shv", r[:, t], state + own * first)
        state.mul_(decay[:, t, :, :, None]).add_(own)
        return out

    return run(step, states.reshape(-1, n_head, size, size), k.shape[1])


def _wkv7(call: Call) -> Tensor | Partial:
    """state ← state · w + v ⊗ k + (state a) ⊗ b; out = state r, rows of the state by value channel."""
    states = call.x(6).double()[0, 0]
    r, w, k, v, a, b = (by_sequence(call.x(i), len(states)) for i in range(6))

    def step(state: Tensor, t: int) -> Tensor:
        told = torch.einsum("shvk,shk->shv", state, a[:, t])
        state.mul_(w[:, t, :, None, :]).addcmul_(v[:, t, :, :, None], k[:, t, :, None, :])
        state.addcmul_(told[..., None], b[:, t, :, None, :])
        return torch.einsum("shvk,shk->shv", state, r[:, t])

    return run(step, states.reshape(len(states), *k.shape[2:], k.shape[-1]), k.shape[1])


KERNELS: dict[str, Kernel] = {"RWKV_WKV6": _wkv6, "RWKV_WKV7": _wkv7}
