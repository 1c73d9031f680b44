"""The lightning indexer of sparse attention: which cached tokens a query should look at (DeepSeek 3.2 and its kin).

By the definition in ggml.h and ggml-cpu/ops.cpp (`ggml_lightning_indexer`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffharness.replay.call import Call, Kernel


def _lightning_indexer(call: Call) -> Tensor:
    """Score of every cached token: the weighted sum over heads of relu(q k), plus the mask.

    q [n_streams, n_tokens, n_head, S]; k [n_streams, n_kv, 1, S], one head for all; weights [n_streams, 1, n_tokens,
    n_head]; mask [n_streams', 1, n_tokens', n_kv]. One token at a time: the products of all would be n_head times the
    output.
    """
    q, k, weights, mask = call.x(0), call.x(1)[:, :, 0], call.x(2)[:, 0], call.x(3)[:, 0]
    n_streams, n_tokens = q.shape[:2]
    out = torch.empty(n_streams, n_tokens, k.shape[1])
    for s in range(n_streams):
        for t in range(n_tokens):
            out[s, t] = weights[s, t] @ torch.relu(q[s, t] @ k[s].T) + mask[s % len(mask), t]
    return out


KERNELS: dict[str, Kernel] = {"LIGHTNING_INDEXER": _lightning_indexer}
