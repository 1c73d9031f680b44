from __future__ import annotations

import numpy as np
import pytest

from tests.replay.ggml_graph import graph
from tests.replay.oracle import agrees

RNG = np.random.default_rng(19)


@pytest.mark.parametrize("cache", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize(("n_streams", "n_tokens"), [(1, 1), (1, 6), (2, 3)])
def test_lightning_indexer(cache: str, n_streams: int, n_tokens: int) -> None:
    n_kv, n_head, size = 40, 8, 64
    mask = np.where(RNG.random((n_streams, 1, n_tokens, n_kv)) < 0.3, -np.inf, 0).astype(np.float16)
    with graph() as g:
        q = g.tensor(RNG.standard_normal((n_streams, n_tokens, n_head, size)).astype(np.float32))
        k = g.tensor(RNG.standard_normal((n_streams, n_kv, 1, size)).astype(np.float32), cache)
        weights = g.tensor(RNG.standard_normal((n_streams, 1, n_tokens, n_head)).astype(np.float32))
        node = agrees(g, g.lightning_indexer(q, k, weights, g.tensor(mask)), 1e-11)
    assert np.isneginf(node.out.array()).any()
