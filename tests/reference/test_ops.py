"""Each operation against its definition, spelled out slowly or known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffharness.reference import moe, ops
from diffharness.reference.model import DEFINITION, GGML, Arithmetic

F16_GELU = Arithmetic(gelu_f16_table=True)
F32_ANGLES = Arithmetic(rope_f32_angles=True)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- norms and activations ---------------------------------------------------------------------------


def test_rms_norm_gives_unit_mean_square_times_weight() -> None:
    x, weight = rand(2, 5, 8) * 7, rand(8, seed=1)
    assert torch.allclose(ops.rms_norm(x, None, 0.0).square().mean(-1), torch.ones(2, 5, dtype=x.dtype))
    assert torch.equal(ops.rms_norm(x, weight, 1e-3), ops.rms_norm(x, None, 1e-3) * weight)
    small = torch.full((1, 4), 1e-4, dtype=torch.float64)
    assert torch.allclose(ops.rms_norm(small, None, 1e-4), small / math.sqrt(1e-8 + 1e-4))


def test_gelu_as_defined_is_the_tanh_form() -> None:
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert torch.allclose(ops.gelu_tanh(x, DEFINITION), expected, atol=1e-14)


def test_gelu_through_ggmls_table_has_float16_arguments_and_results() -> None:
    x = torch.linspace(-9.99, 9.99, 4001)
    table = ops.gelu_tanh(x, F16_GELU)
    assert torch.equal(table, table.half().float())
    assert torch.equal(table, ops.gelu_tanh(x.half().float(), F16_GELU))
    plain = ops.gelu_tanh(x)
    assert not torch.equal(table, plain)
    assert float((table - plain).abs().max()) < 6e-3  # half a unit in the last place of an argument near 10


def test_gelu_through_ggmls_table_ends_at_ten() -> None:
    x = torch.tensor([-50.0, -10.0, 10.0, 10.001, 1234.567])
    assert ops.gelu_tanh(x, F16_GELU).tolist() == [0.0, 0.0, *x[2:].tolist()]


def test_softcap_bounds_and_keeps_small_values() -> None:
    x = torch.tensor([-1e6, -0.01, 0.0, 0.01, 1e6], dtype=torch.float64)
    capped = ops.softcap(x, 30.0)
    assert float(capped.abs().max()) <= 30.0
    assert torch.allclose(capped[1:4], x[1:4], atol=1e-8)
    assert ops.softcap(x, None) is x


# -- rope ----------------------------------------------------------------------------------------------


def test_rope_tables_are_the_cosines_of_position_times_frequency() -> None:
    cos, sin = ops.rope_tables(torch.arange(50), 8, 100.0, dtype=torch.float64)
    frequency = np.array([100.0 ** (-2 * i / 8) for i in range(4)])
    angles = np.arange(50)[:, None] * frequency
    np.testing.assert_allclose(cos.numpy(), np.cos(angles), atol=1e-13)
    np.testing.assert_allclose(sin.numpy(), np.sin(angles), atol=1e-13)


def test_frequency_factors_divide_and_linear_scaling_multiplies() -> None:
    positions = torch.arange(20)
    doubled = ops.rope_tables(positions, 4, 1e4, freq_factors=torch.full((2,), 2.0), dtype=torch.float64)
    half = ops.rope_tables(positions, 4, 1e4, scaling=ops.RopeScaling(freq_scale=0.5), dtype=torch.float64)
    every_second = ops.rope_tables(positions * 2, 4, 1e4, scaling=ops.RopeScaling(freq_scale=0.25), dtype=torch.float64)
    for a, b, c in zip(doubled, half, every_second, strict=True):
        assert torch.allclose(a, b, atol=1e-14)
        assert torch.allclose(a, c, atol=1e-14)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    scaling = ops.RopeScaling(freq_scale=0.25, ext_factor=1.0, magnitude=1.5, n_ctx_orig=4096)
    positions = torch.arange(30)
    cos, _ = ops.rope_tables(positions, 128, 1e4, scaling=scaling, dtype=torch.float64)
    plain, _ = ops.rope_tables(positions, 128, 1e4, dtype=torch.float64)
    linear, _ = ops.rope_tables(positions, 128, 1e4, scaling=ops.RopeScaling(freq_scale=0.25), dtype=torch.float64)
    assert torch.allclose(cos[:, 0], 1.5 * plain[:, 0])
    assert torch.allclose(cos[:, -1], 1.5 * linear[:, -1])
    between = cos[:, 32] / 1.5
    assert not torch.allclose(between, plain[:, 32]) and not torch.allclose(between, linear[:, 32])


def test_float32_angles_are_made_by_repeated_multiplication() -> None:
    """The definition of the convention, one float32 operation after another."""
    base, n_rot, factors = 1e4, 16, np.linspace(1, 3, 8).astype(np.float32)
    step = np.float32(np.float64(np.float32(base)) ** (-2 / n_rot))
    expected = np.empty((600, 8), np.float32)
    for position in range(600):
        theta = np.float32(position)
        for i in range(8):
            expected[position, i] = theta / factors[i] * np.float32(0.5)
            theta = theta * step
    cos, sin = ops.rope_tables(
        torch.arange(600),
        n_rot,
        base,
        freq_factors=torch.from_numpy(factors),
        scaling=ops.RopeScaling(freq_scale=0.5),
        arithmetic=F32_ANGLES,
    )
    np.testing.assert_allclose(cos.numpy(), np.cos(expected.astype(np.float64)), atol=2e-7)
    np.testing.assert_allclose(sin.numpy(), np.sin(expected.astype(np.float64)), atol=2e-7)


def test_float32_angles_drift_with_position() -> None:
    positions = torch.tensor([8, 4000])
    exact, _ = ops.rope_tables(positions, 128, 1e4)
    drifted, _ = ops.rope_tables(positions, 128, 1e4, arithmetic=F32_ANGLES)
    error = (exact - drifted).abs().amax(dim=-1)
    assert 0 < float(error[0]) < 1e-5
    assert float(error[1]) > 30 * float(error[0])


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_turns_pairs_and_keeps_lengths(interleaved: bool) -> None:
    x = rand(2, 9, 3, 8)
    cos, sin = ops.rope_tables(torch.arange(9), 8, 50.0, dtype=torch.float64)
    y = ops.apply_rope(x, cos, sin, interleaved=interleaved)
    a, b = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    turned = torch.complex(x[..., a], x[..., b]) * torch.complex(cos, sin)[:, None, :]
    assert torch.allclose(y[..., a], turned.real) and torch.allclose(y[..., b], turned.imag)
    assert torch.equal(y[:, 0], x[:, 0])  # position 0


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_on_a_part_of_the_head_leaves_the_rest(interleaved: bool) -> None:
    x = rand(1, 5, 2, 12)
    cos, sin = ops.rope_tables(torch.arange(5), 4, 50.0, dtype=torch.float64)
    y = ops.apply_rope(x, cos, sin, interleaved=interleaved)
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert torch.equal(y[..., :4], ops.apply_rope(x[..., :4], cos, sin, interleaved=interleaved))


# -- attention -----------------------------------------------------------------------------------------


def slow_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    n_batch, n_tokens, n_head, _ = q.shape
    group = n_head // k.shape[2]
    out = torch.zeros(n_batch, n_tokens, n_head, v.shape[-1], dtype=q.dtype)
    for b in range(n_batch):
        for h in range(n_head):
            for i in range(n_tokens):
                seen = [j for j in range(i + 1) if window is None or i - j < window]
                scores = torch.stack([q[b, i, h] @ k[b, j, h // group] * scale for j in seen])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[b, i, h] = scores.softmax(0) @ v[b, seen, h // group]
    return out.flatten(-2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_attention_is_what_it_says(window: int | None, softcap: float | None) -> None:
    q, k, v = rand(2, 23, 4, 6), rand(2, 23, 2, 6, seed=1), rand(2, 23, 2, 3, seed=2)
    expected = slow_attention(q, k, v, 0.7, window, softcap)
    found = ops.attention(q, k, v, scale=0.7, window=window, softcap=softcap)
    assert torch.allclose(found, expected, atol=1e-12)


def test_attention_in_blocks_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = rand(1, 90, 4, 8), rand(1, 90, 2, 8, seed=1), rand(1, 90, 2, 8, seed=2)
    whole = ops.attention(q, k, v, scale=0.3, window=20, softcap=5.0)
    monkeypatch.setattr(ops, "_QUERY_BLOCK", 16)  # several blocks, the last one short
    assert torch.allclose(ops.attention(q, k, v, scale=0.3, window=20, softcap=5.0), whole, atol=1e-13)


def test_fused_attention_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = rand(2, 70, 6, 8), rand(2, 70, 2, 8, seed=1), rand(2, 70, 2, 5, seed=2)
    in_memory = ops.attention(q, k, v, scale=0.4)
    monkeypatch.setattr(ops, "_FUSED_FROM", 70)
    asked: list[float] = []
    fused = ops._fused_attention
    monkeypatch.setattr(ops, "_fused_attention", lambda *x: (asked.append(x[-1]), fused(*x))[1])
    assert torch.allclose(ops.attention(q, k, v, scale=0.4), in_memory, atol=1e-13)
    for other in ({"window": 9}, {"softcap": 2.0}, {"chunk": 16}, {"sinks": torch.zeros(6)}, {"slopes": torch.ones(6)}):
        ops.attention(q, k, v, scale=0.4, **other)
    assert asked == [0.4], "what the kernel does not know is not given to it"


def test_attention_does_not_mix_a_batch() -> None:
    q, k, v = rand(3, 12, 4, 8), rand(3, 12, 2, 8, seed=1), rand(3, 12, 2, 8, seed=2)
    together = ops.attention(q, k, v, scale=0.3, window=4)
    alone = ops.attention(q[1:2], k[1:2], v[1:2], scale=0.3, window=4)
    assert torch.allclose(together[1:2], alone, atol=1e-13)


# -- experts -------------------------------------------------------------------------------------------


def test_routing_ties_go_to_the_lower_expert() -> None:
    weights, experts = moe.route(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), 2, normalise=True)
    assert experts.tolist() == [[1, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_routed_weights_are_softmax_over_all_experts() -> None:
    logits = rand(7, 6)
    raw, experts = moe.route(logits, 3, normalise=False)
    assert torch.allclose(raw, logits.softmax(-1).gather(-1, experts))
    assert float(raw.sum(-1).max()) < 1.0
    normalised, _ = moe.route(logits, 3, normalise=True)
    assert torch.allclose(normalised, raw / raw.sum(-1, keepdim=True))


@settings(max_examples=30, deadline=None)
@given(n_tokens=st.integers(1, 9), n_expert=st.integers(1, 5), seed=st.integers(0, 99))
def test_experts_weighted_sum(n_tokens: int, n_expert: int, seed: int) -> None:
    n_used = 1 + seed % n_expert
    x, matrices = rand(1, n_tokens, 4, seed=seed), rand(n_expert, 4, 4, seed=seed + 1)
    weights, experts = moe.route(rand(1, n_tokens, n_expert, seed=seed + 2), n_used, normalise=True)
    asked: list[int] = []

    def ffn(expert: int, rows: torch.Tensor) -> torch.Tensor:
        asked.append(expert)
        return rows @ matrices[expert]

    out = moe.mix(x, weights, experts, ffn)
    expected = torch.einsum("btk,btkij,bti->btj", weights, matrices[experts], x)
    assert torch.allclose(out, expected, atol=1e-12)
    assert asked == sorted(set(experts.flatten().tolist()))


# -- autograd ------------------------------------------------------------------------------------------


def test_operations_are_differentiable() -> None:
    q, k, v = (rand(1, 6, 2, 4, seed=i).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, scale=0.5, window=3, softcap=4.0), (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, scale=0.5), (q, k, v))
    x = rand(3, 4, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.gelu_tanh(ops.rms_norm(t, None, 1e-3), DEFINITION), (x,))


def test_conventions_have_names() -> None:
    assert DEFINITION.conventions == ()
    assert GGML.conventions == ("gelu_f16_table", "rope_f32_angles")
