from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from diffharness.replay.call import Call, NoReplay, Partial
from diffharness.replay.recurrent import KERNELS
from tests.replay.ggml_graph import Graph, graph
from tests.replay.nodes import NoWeights, replay
from tests.replay.oracle import agrees, distance, nmse

RNG = np.random.default_rng(11)
LIMIT = 1e-12


def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize(("n_seqs", "n_tokens"), [(1, 1), (1, 17), (3, 5)])
@pytest.mark.parametrize("d_conv", [3, 4])
def test_ssm_conv(d_conv: int, n_seqs: int, n_tokens: int) -> None:
    with graph() as g:
        x, filters = normal(n_seqs, 48, d_conv - 1 + n_tokens), normal(48, d_conv)
        agrees(g, g.ssm_conv(g.tensor(x), g.tensor(filters)), LIMIT)


def scan(
    g: Graph, *, mamba: int, n_seqs: int, n_tokens: int, n_kept: int = 1, n_group: int = 1, n_head: int = 4
) -> int:
    dim, d_state = (1, 16) if mamba == 1 else (8, 40)
    state = normal(n_seqs + 2, n_head, dim, d_state)
    decay = -np.abs(normal(n_head, d_state if mamba == 1 else 1))
    slots = np.arange(n_seqs, dtype=np.int32)[::-1] + 1
    x, dt = normal(n_seqs, n_tokens, n_head, dim), normal(n_seqs, n_tokens, n_head, scale=9)
    b, c = (normal(n_seqs, n_tokens, n_group, d_state) for _ in range(2))
    return g.ssm_scan(*(g.tensor(each) for each in (state, x, dt, decay, b, c, slots)), n_kept)


@pytest.mark.parametrize("mamba", [1, 2])
@pytest.mark.parametrize(("n_seqs", "n_tokens"), [(1, 1), (1, 19), (3, 6)])
@pytest.mark.parametrize("n_group", [1, 2])
def test_ssm_scan(mamba: int, n_seqs: int, n_tokens: int, n_group: int) -> None:
    with graph() as g:
        agrees(g, scan(g, mamba=mamba, n_seqs=n_seqs, n_tokens=n_tokens, n_group=n_group), LIMIT)


@pytest.mark.parametrize("n_kept", [2, 5])
def test_ssm_scan_keeps_the_last_states(n_kept: int) -> None:
    with graph() as g:
        agrees(g, scan(g, mamba=2, n_seqs=2, n_tokens=5, n_kept=n_kept), LIMIT)


def test_states_from_before_the_first_token_are_not_defined() -> None:
    with graph() as g:
        node = g.run(scan(g, mamba=2, n_seqs=2, n_tokens=3, n_kept=5))
        partial = KERNELS["SSM_SCAN"](Call(node, NoWeights()))
    assert isinstance(partial, Partial)
    n_read, n_state = 2 * 3 * 4 * 8, 2 * 4 * 8 * 40
    assert partial.values.shape == partial.defined.shape == (n_read + 5 * n_state,)
    assert partial.defined[: n_read + 3 * n_state].all() and not partial.defined[n_read + 3 * n_state :].any()
    defined = partial.defined.numpy()
    assert nmse(node.out.array().reshape(-1)[defined], partial.values.numpy()[defined]) < LIMIT


def delta_net(g: Graph, *, n_seqs: int, n_tokens: int, per_channel: bool, n_k_heads: int = 4, n_kept: int = 1) -> int:
    size, n_head = 32, 4
    q, k = (normal(n_seqs, n_tokens, n_k_heads, size, scale=0.2) for _ in range(2))
    v, beta = normal(n_seqs, n_tokens, n_head, size), np.abs(normal(n_seqs, n_tokens, n_head, 1))
    gate = -np.abs(normal(n_seqs, n_tokens, n_head, size if per_channel else 1))
    state = normal(n_seqs, n_head, size, size)
    return g.gated_delta_net(*(g.tensor(each) for each in (q, k, v, gate, beta, state)), n_kept)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("n_seqs", "n_tokens"), [(1, 1), (1, 13), (3, 6)])
@pytest.mark.parametrize("n_k_heads", [2, 4])
def test_gated_delta_net(n_seqs: int, n_tokens: int, per_channel: bool, n_k_heads: int) -> None:
    with graph() as g:
        agrees(g, delta_net(g, n_seqs=n_seqs, n_tokens=n_tokens, per_channel=per_channel, n_k_heads=n_k_heads), LIMIT)


def test_gated_delta_net_keeps_the_last_states() -> None:
    with graph() as g:
        agrees(g, delta_net(g, n_seqs=2, n_tokens=5, per_channel=True, n_kept=3), LIMIT)


@pytest.mark.parametrize(("n_seqs", "n_tokens"), [(1, 1), (1, 9), (3, 12)])
def test_gated_linear_attention(n_seqs: int, n_tokens: int) -> None:
    n_head, size = 3, 32
    with graph() as g:
        k, v, q = (g.tensor(normal(n_tokens, n_head, size)) for _ in range(3))
        gate = g.tensor(RNG.uniform(0.1, 0.9, (n_tokens, n_head, size)).astype(np.float32))
        state = g.tensor(normal(n_seqs, size * size * n_head))
        agrees(g, g.gated_linear_attn(k, v, q, gate, state, 0.25), LIMIT)


def scan_of_one(g: Graph) -> int:
    return scan(g, mamba=2, n_seqs=1, n_tokens=3)


def delta_net_of_one(g: Graph) -> int:
    return delta_net(g, n_seqs=1, n_tokens=3, per_channel=True)


def test_solve_tri() -> None:
    with graph() as g:
        a = np.tril(normal(2, 3, 12, 12, scale=0.2)) + np.eye(12, dtype=np.float32)
        agrees(g, g.solve_tri(g.tensor(a), g.tensor(normal(2, 3, 12, 7)), True, True, False), LIMIT)


@pytest.mark.parametrize("source", range(6))
@pytest.mark.parametrize("op", [scan_of_one, delta_net_of_one])
def test_every_input_counts(op: Callable[[Graph], int], source: int) -> None:
    """An engine that misread an input a little would not pass: the replay of what it should have read differs."""
    with graph() as g:
        node = g.run(op(g))
    value = node.sources[source]
    assert value is not None and value.raw is not None
    changed = replace(value, raw=(value.raw.view(np.float32) * np.float32(1.001)).view(np.uint8))
    sources = (*node.sources[:source], changed, *node.sources[source + 1 :])
    assert distance(node) < LIMIT
    assert distance(replace(node, sources=sources)) > 1e-9


def test_a_form_that_is_not_known_is_not_replayed() -> None:
    with graph() as g:
        node = g.run(scan_of_one(g))
    with pytest.raises(NoReplay):
        replay(replace(node, sources=node.sources[:6]))
