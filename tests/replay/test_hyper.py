from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from diffharness.replay.hyper import KERNELS
from tests.replay.ggml_graph import graph
from tests.replay.oracle import agrees

RNG = np.random.default_rng(17)
LIMIT = 1e-12
N = 4  # streams


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n_tokens", [1, 7])
@pytest.mark.parametrize("n_iterations", [1, 2, 20])
def test_comb(n_tokens: int, n_iterations: int) -> None:
    with graph() as g:
        mixes, scale, base = (g.tensor(normal(*shape)) for shape in ((n_tokens, (2 + N) * N), (3,), ((2 + N) * N,)))
        agrees(g, g.dsv4_hc_comb(mixes, scale, base, 1e-3, n_iterations), LIMIT)


@pytest.mark.parametrize("n_tokens", [1, 7])
def test_pre(n_tokens: int) -> None:
    with graph() as g:
        agrees(g, g.dsv4_hc_pre(g.tensor(normal(n_tokens, N, 24)), g.tensor(normal(n_tokens, N))), LIMIT)


@pytest.mark.parametrize("n_tokens", [1, 7])
def test_gated_pre(n_tokens: int) -> None:
    with graph() as g:
        x, logits = g.tensor(normal(n_tokens, N, 24)), g.tensor(normal(n_tokens, N, 24))
        agrees(g, g.dsv4_hc_pre_gated(x, logits, 0.25), LIMIT)


@pytest.mark.parametrize("n_tokens", [1, 7])
@pytest.mark.parametrize("mixed", [True, False])
def test_post(n_tokens: int, mixed: bool) -> None:
    with graph() as g:
        x, streams, post = (g.tensor(normal(n_tokens, *rest)) for rest in ((24,), (N, 24), (N,)))
        comb = g.tensor(normal(n_tokens, N, N)) if mixed else None
        agrees(g, g.dsv4_hc_post(x, streams, post, comb), LIMIT)


def test_every_hyper_connection_op_has_a_kernel() -> None:
    assert set(KERNELS) == {"DSV4_HC_PRE", "DSV4_HC_POST", "DSV4_HC_COMB"}
