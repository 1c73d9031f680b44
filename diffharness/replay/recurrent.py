"""Recurrences over the tokens of a sequence: state space models, gated delta nets, gated linear attention.

By the definitions in ggml.h and ggml-cpu/ops.cpp. All heads, channels and sequences of a token are one step here; the
tokens come one after another. A node's output is flat: first what the tokens read, then the states. Computed in
float64, so that what is left against the engine is the engine's own rounding; softplus alone is taken in ggml's
float32 steps, because log(1 + exp(x)) loses digits for negative x there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffharness.replay.call import Call, Kernel, NoReplay, Partial
from diffharness.replay.elementwise import softplus


def _ssm_conv(call: Call) -> Tensor:
    """Each channel's own filter [d_inner, d_conv] over its row of [n_seqs, d_inner, d_conv - 1 + n_tokens]."""
    x, filters = call.x(0)[0].double(), call.x(1)[0, 0].double()
    windows = x.unfold(-1, filters.shape[-1], 1)
    return torch.einsum("sctk,ck->stc", windows, filters)


def _ssm_scan(call: Call) -> Tensor | Partial:
    """state ← state · exp(dt A) + dt x ⊗ B; y = state · C, with A per head (Mamba 2) or per head and state (Mamba 1).

    s [n_slots, n_head, dim, d_state], of which `ids` names one per sequence; x [n_seqs, n_tokens, n_head, dim];
    dt [n_seqs, n_tokens, n_head] before its softplus; B, C [n_seqs, n_tokens, n_group, d_state].
    """
    if not call.has(6):
        raise NoReplay("the form of builds before 2025, without slots of sequences")
    x, dt = call.x(1).double(), softplus(call.x(2)[0]).double()
    n_seqs, n_tokens, n_head, _ = x.shape
    heads_per_group = n_head // call.x(4).shape[2]
    b, c = (call.x(i).double().repeat_interleave(heads_per_group, dim=2) for i in (4, 5))
    decay = torch.exp(dt[..., None] * call.x(3)[0, 0].double())[..., None, :]  # [.., n_head, 1, d_state or 1]
    update = x * dt[..., None]
    first = call.x(0)[call.ints(6).reshape(-1)[:n_seqs]].double()

    def step(state: Tensor, t: int) -> Tensor:
        state.mul_(decay[:, t]).addcmul_(update[:, t, :, :, None], b[:, t, :, None, :])
        return torch.einsum("shdn,shn->shd", state, c[:, t])

    return run(step, first, n_tokens, n_kept=max(1, call.i(0)))


def _gated_delta_net(call: Call) -> Tensor | Partial:
    """state ← state · exp(g); state += beta (v - state k) ⊗ k; out = state q / √S.

    q, k [n_seqs', n_tokens, n_head', S], repeated over the heads of v and over its sequences; the gate g is one number
    per head, or one per key channel (Kimi delta attention). States [n_seqs, n_head, value, key].
    """
    v, g, beta = (call.x(i).double() for i in (2, 3, 4))
    n_seqs, n_tokens, n_head, size = v.shape
    q, k = (_repeated(call.x(i).double(), n_seqs, n_head) for i in (0, 1))
    state, decay = call.x(5).double(), torch.exp(g)[..., None, :]  # decay [.., n_head, 1, S or 1]
    if state.numel() != n_seqs * n_head * size * size:
        raise NoReplay(f"states of shape {list(state.shape)}, for {n_seqs} sequences of {n_head} heads of {size}")

    def step(state: Tensor, t: int) -> Tensor:
        told = torch.einsum("shvk,shk->shv", state.mul_(decay[:, t]), k[:, t])
        state.addcmul_(((v[:, t] - told) * beta[:, t])[..., None], k[:, t, :, None, :])
        return torch.einsum("shvk,shk->shv", state, q[:, t]) / math.sqrt(size)

    return run(step, state.reshape(n_seqs, n_head, size, size), n_tokens, n_kept=max(1, call.i(0)))


def _repeated(x: Tensor, n_seqs: int, n_head: int) -> Tensor:
    """Keys of fewer heads and sequences: head h takes h mod n (as in ggml, not in blocks), sequences take blocks."""
    return x.repeat(1, 1, n_head // x.shape[2], 1).repeat_interleave(n_seqs // x.shape[0], dim=0)


def _gated_linear_attention(call: Call) -> Tensor | Partial:
    """state ← state · g + k ⊗ v; out = scale · qᵀ state, the gate g per key channel.

    k, v, q, g [n_tokens, n_head, S], the tokens of the first sequence first; states [n_seqs, n_head, key, value].
    """
    states = call.x(4).double()[0, 0]
    k, v, q, g = (by_sequence(call.x(i), len(states)) for i in range(4))

    def step(state: Tensor, t: int) -> Tensor:
        state.mul_(g[:, t, :, :, None]).addcmul_(k[:, t, :, :, None], v[:, t, :, None, :])
        return torch.einsum("shk,shkv->shv", q[:, t], state) * call.f(0)

    return run(step, states.reshape(len(states), *k.shape[2:], k.shape[-1]), k.shape[1])


def by_sequence(x: Tensor, n_seqs: int) -> Tensor:
    """[1, n_tokens of all, n_head, S] as float64 [n_seqs, n_tokens of each, n_head, S]."""
    return x.double().reshape(n_seqs, -1, *x.shape[2:])


Step = Callable[[Tensor, int], Tensor]
"""Takes the state over token t, in place, and gives what that token reads."""


def run(step: Step, state: Tensor, n_tokens: int, n_kept: int = 1) -> Tensor | Partial:
    """What all tokens read [n_seqs, n_tokens, ...], flat, and behind it the last `n_kept` states, the newest first.

    Of states that would lie before the first token the engine writes nothing: they are not defined.
    """
    read: list[Tensor] = []
    kept: list[Tensor] = []
    for t in range(n_tokens):
        read.append(step(state, t))
        if n_tokens - t <= n_kept:
            kept.insert(0, state.clone())
    missing = n_kept - len(kept)
    parts = [torch.stack(read, dim=1), *kept]
    defined = torch.cat([part.reshape(-1) for part in parts])
    if not missing:
        return defined
    n_undefined = missing * state.numel()
    values = torch.cat([defined, defined.new_zeros(n_undefined)])
    return Partial(values, torch.arange(len(values)) < len(defined))


def _solve_tri(call: Call) -> Tensor:
    """X of A X = B with a lower triangular A."""
    solution: Tensor = torch.linalg.solve_triangular(call.x(0).double(), call.x(1).double(), upper=False)
    return solution


KERNELS: dict[str, Kernel] = {
    "SSM_CONV": _ssm_conv,
    "SSM_SCAN": _ssm_scan,
    "GATED_DELTA_NET": _gated_delta_net,
    "GATED_LINEAR_ATTN": _gated_linear_attention,
    "SOLVE_TRI": _solve_tri,
}
