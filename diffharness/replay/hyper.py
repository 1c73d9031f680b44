"""Hyper-connections: several residual streams that are mixed, read and written per token (DeepSeek 4 and its kin).

By the definitions in ggml.h and ggml-cpu/ops.cpp (`ggml_dsv4_hc_*`). Streams are [n_tokens, n_streams, n_embd].
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffharness.replay.call import Call, Kernel


def _pre(call: Call) -> Tensor:
    """What a block reads: the streams' weighted sum, weights [n_tokens, n_streams].

    The gated form has a logit of its own for every value, [n_tokens, n_streams, n_embd].
    """
    x, weights = call.x(0)[0].double(), call.x(1)[0].double()
    weights = torch.sigmoid(weights) if call.i(1) else weights[0, :, :, None]
    return (x * weights).sum(1) * call.f(0)


def _post(call: Call) -> Tensor:
    """What a block leaves: its output in every stream, by `post`, on top of the mixed (or plain) old streams.

    comb [n_tokens, from stream, to stream].
    """
    x, streams, post = call.x(0)[0, 0].double(), call.x(1)[0].double(), call.x(2)[0, 0].double()
    if call.has(3):
        streams = torch.einsum("tie,tio->toe", streams, call.x(3)[0].double())
    return x[:, None, :] * post[..., None] + streams


def _comb(call: Call) -> Tensor:
    """The mixing matrix of a token: a softmax over the streams written, then Sinkhorn's alternating normalisation.

    mixes [n_tokens, (2 + n) n], whose last n² values count here; scale's third value and the base go with them.
    """
    mixes, scale, base = call.x(0)[0, 0].double(), call.x(1).double().reshape(-1), call.x(2).double().reshape(-1)
    n, eps = call.node.out.shape[-1], call.f(0)
    logits = mixes[:, 2 * n :] * scale[2] + base[2 * n :]
    comb = torch.softmax(logits.reshape(-1, n, n), dim=-1) + eps  # [n_tokens, from, to]
    comb = _normalised(comb, 1, eps)
    for _ in range(1, call.i(1)):
        comb = _normalised(_normalised(comb, 2, eps), 1, eps)
    return comb


def _normalised(comb: Tensor, axis: int, eps: float) -> Tensor:
    return comb / (comb.sum(axis, keepdim=True) + eps)


KERNELS: dict[str, Kernel] = {"DSV4_HC_PRE": _pre, "DSV4_HC_POST": _post, "DSV4_HC_COMB": _comb}
