from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.replay.ggml_graph import graph
from tests.replay.oracle import agrees

RNG = np.random.default_rng(13)
LIMIT = 1e-12
SHAPES = [(1, 1), (1, 9), (3, 12)]


def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def decays(*shape: int) -> NDArray[np.float32]:
    return RNG.uniform(0.1, 0.99, shape).astype(np.float32)


@pytest.mark.parametrize(("n_seqs", "n_tokens"), SHAPES)
@pytest.mark.parametrize("size", [32, 64])
def test_wkv6(n_seqs: int, n_tokens: int, size: int) -> None:
    n_head = 3
    with graph() as g:
        k, v, r = (g.tensor(normal(n_tokens, n_head, size)) for _ in range(3))
        first, decay = g.tensor(normal(n_head, size)), g.tensor(decays(n_tokens, n_head, size))
        state = g.tensor(normal(n_seqs, n_head * size * size))
        agrees(g, g.rwkv_wkv6(k, v, r, first, decay, state), LIMIT)


# ggml's vector loop of WKV 7 takes 64 values a step (AVX-512; 32 with AVX2) without looking at what is left: heads of
# another size are read and written past their end. Models have 64.
@pytest.mark.parametrize(("n_seqs", "n_tokens"), SHAPES)
@pytest.mark.parametrize("size", [64, 128])
def test_wkv7(n_seqs: int, n_tokens: int, size: int) -> None:
    n_head = 3
    with graph() as g:
        r, k, v = (g.tensor(normal(n_tokens, n_head, size)) for _ in range(3))
        w = g.tensor(decays(n_tokens, n_head, size))
        a, b = (g.tensor(normal(n_tokens, n_head, size, scale=size**-0.5)) for _ in range(2))
        state = g.tensor(normal(n_seqs, n_head * size * size))
        agrees(g, g.rwkv_wkv7(r, w, k, v, a, b, state), LIMIT)
