"""Recurrences solved by blocks against the same token by token, over several blocks and an incomplete one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffharness.reference import moe, recurrent

B, T, H = 2, 150, 4


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nmse(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).square().sum() / expected.square().sum())


def scan_by_token(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Mamba's recurrence of x and dt [B, T, C], a [C, N], b and c [B, T, N], d [C]."""
    state, outputs = x.new_zeros(x.shape[0], *a.shape), []
    for t in range(x.shape[1]):
        state = (dt[:, t, :, None] * a).exp() * state + (dt * x)[:, t, :, None] * b[:, t, None, :]
        outputs.append(torch.einsum("bcn,bn->bc", state, c[:, t]) + d * x[:, t])
    return torch.stack(outputs, dim=1)


def head_scan_by_token(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Mamba 2's, of the same shapes as `recurrent.head_scan`."""
    state, outputs = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1]), []
    b, c = (y.repeat_interleave(x.shape[2] // y.shape[2], dim=2) for y in (b, c))
    for t in range(x.shape[1]):
        added = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        state = (dt[:, t] * a).exp()[..., None, None] * state + added
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]) + d[:, None] * x[:, t])
    return torch.stack(outputs, dim=1)


def delta_by_token(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule with one decay a head."""
    state, outputs = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = state * log_decay[:, t, :, None, None].exp()
        held = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1)


def of_scan(strength: float) -> tuple[Tensor, ...]:
    a, n_state = -uniform(6, 5, seed=2) * 5, 5
    b, c = rand(B, T, n_state, seed=3), rand(B, T, n_state, seed=4)
    return rand(B, T, 6), strength * uniform(B, T, 6, seed=1), a, b, c, rand(6, seed=5)


def of_head_scan(strength: float) -> tuple[Tensor, ...]:
    b, c = rand(B, T, 2, 5, seed=3), rand(B, T, 2, 5, seed=4)
    return rand(B, T, H, 3), strength * uniform(B, T, H, seed=1), -uniform(H, seed=2) * 16, b, c, rand(H, seed=5)


def of_delta_rule(strength: float) -> tuple[Tensor, ...]:
    q, k = (torch.nn.functional.normalize(rand(B, T, H, 8, seed=seed), dim=-1) for seed in (0, 1))
    log_decay = -strength * uniform(B, T, H, seed=3)
    return q, k, rand(B, T, H, 5, seed=2), log_decay, uniform(B, T, H, seed=4)


KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[float], tuple[Tensor, ...]]]] = {
    "channels": (recurrent.selective_scan, scan_by_token, of_scan),
    "heads": (recurrent.head_scan, head_scan_by_token, of_head_scan),
    "delta rule": (recurrent.gated_delta_rule, delta_by_token, of_delta_rule),
}


@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0, 100.0])  # of the decay: none at all to all forgotten at once
@pytest.mark.parametrize("kind", KINDS)
def test_by_blocks_is_token_by_token(kind: str, strength: float) -> None:
    by_blocks, by_token, draw = KINDS[kind]
    values = draw(strength)
    expected = by_token(*values)
    assert nmse(by_blocks(*values), expected) <= 1e-26
    in_float32 = by_blocks(*(x.float() for x in values))
    assert in_float32.dtype == torch.float32 and nmse(in_float32, expected) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_nothing_before_them(kind: str) -> None:
    by_blocks, _, draw = KINDS[kind]
    values = draw(0.1)
    cut = tuple(x[:, :70] if x.dim() > 2 else x for x in values)
    assert torch.allclose(by_blocks(*cut), by_blocks(*values)[:, :70], atol=1e-12)


def test_experts_are_mixed_as_each_token_by_itself_would() -> None:
    x, matrices = rand(2, 9, 6), rand(5, 6, 6, seed=1)
    weights, experts = moe.route(rand(2, 9, 5, seed=2), 2, normalise=True)
    y = moe.mix(x, weights, experts, lambda expert, some: some @ matrices[expert].T)
    chosen = matrices[experts]  # [B, T, n_used, E, E]
    assert torch.allclose(y, torch.einsum("btu,btuoi,bti->bto", weights, chosen, x), atol=1e-12)
