"""Recurrences against their definitions spelled out, against each other, and in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffharness.errors import UnsupportedError
from diffharness.reference import archs, recurrent
from diffharness.reference.archs.qwen35 import Qwen35
from diffharness.reference.runner import Reference
from diffharness.weights.source import Float32Array, Overlay, TensorInfo
from diffharness.weights.synth import SynthSource

B, T = 2, 70  # longer than a block


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def negative(*shape: int, seed: int = 0) -> torch.Tensor:
    return -rand(*shape, seed=seed).abs() - 0.1


# -- convolution and norms -----------------------------------------------------------------------------


def test_a_convolution_sees_its_token_and_those_before() -> None:
    x, weight, bias = rand(B, T, 5), rand(5, 3, seed=1), rand(5, seed=2)
    y = recurrent.causal_conv(x, weight, bias)
    for t in range(T):
        expected = bias.expand(B, 5).clone()
        for back in range(min(3, t + 1)):
            expected += weight[:, 2 - back] * x[:, t - back]
        assert torch.allclose(y[:, t], expected, atol=1e-13)


def test_a_vector_of_length_one_stays_so_but_for_epsilon() -> None:
    x = rand(B, T, 8)
    assert torch.allclose(recurrent.l2_norm(x, 0.0).square().sum(-1), torch.ones(B, T, dtype=x.dtype))
    assert torch.allclose(recurrent.l2_norm(torch.zeros(3, dtype=x.dtype), 1e-6), torch.zeros(3, dtype=x.dtype))
    small = torch.tensor([3e-3, 4e-3], dtype=torch.float64)
    assert torch.allclose(recurrent.l2_norm(small, 1e-6), small / math.sqrt(25e-6 + 1e-6))


def test_groups_are_normalised_each_by_itself() -> None:
    x, weight = rand(B, T, 6), rand(6, seed=1)
    y = recurrent.grouped_rms_norm(x, weight.reshape(3, 2), 1e-3, 3)
    for group in range(3):
        part = slice(2 * group, 2 * group + 2)
        scale = (x[..., part].square().mean(-1, keepdim=True) + 1e-3).sqrt()
        assert torch.allclose(y[..., part], x[..., part] / scale * weight[part])


# -- scans ---------------------------------------------------------------------------------------------


def test_selective_scan_is_its_recurrence() -> None:
    n_channels, n_state = 3, 4
    x, dt, a = rand(B, T, n_channels), rand(B, T, n_channels, seed=1).abs(), negative(n_channels, n_state, seed=2)
    b, c, d = rand(B, T, n_state, seed=3), rand(B, T, n_state, seed=4), rand(n_channels, seed=5)
    y = recurrent.selective_scan(x, dt, a, b, c, d)
    for batch in range(B):
        for channel in range(n_channels):
            h = [0.0] * n_state
            for t in range(T):
                step, value = float(dt[batch, t, channel]), float(x[batch, t, channel])
                for n in range(n_state):
                    h[n] = math.exp(step * float(a[channel, n])) * h[n] + step * value * float(b[batch, t, n])
                out = sum(h[n] * float(c[batch, t, n]) for n in range(n_state)) + float(d[channel]) * value
                assert float(y[batch, t, channel]) == pytest.approx(out, abs=1e-12)


def test_a_constant_input_makes_a_geometric_sum() -> None:
    one = torch.ones(1, 20, 1, dtype=torch.float64)
    y = recurrent.selective_scan(one, one, torch.full((1, 1), -0.5).double(), one, one, torch.zeros(1).double())
    ratio = math.exp(-0.5)
    expected = torch.tensor([(1 - ratio ** (t + 1)) / (1 - ratio) for t in range(20)], dtype=torch.float64)
    assert torch.allclose(y[0, :, 0], expected, atol=1e-13)


def test_scan_by_heads_is_the_scan_by_channels_with_one_decay_a_head() -> None:
    n_head, size, n_group, n_state = 4, 3, 2, 5
    x, dt, a = rand(B, T, n_head, size), rand(B, T, n_head, seed=1).abs(), negative(n_head, seed=2)
    b, c, d = rand(B, T, n_group, n_state, seed=3), rand(B, T, n_group, n_state, seed=4), rand(n_head, seed=5)
    y = recurrent.head_scan(x, dt, a, b, c, d)
    for head in range(n_head):
        group = head // (n_head // n_group)
        alone = recurrent.selective_scan(
            x[:, :, head],
            dt[:, :, head, None].expand(-1, -1, size),
            a[head].expand(size, n_state),
            b[:, :, group],
            c[:, :, group],
            d[head].expand(size),
        )
        assert torch.allclose(y[:, :, head], alone, atol=1e-12)


# -- delta rules ---------------------------------------------------------------------------------------


def test_the_delta_rule_is_its_recurrence() -> None:
    n_head, n_key, n_value = 2, 4, 3
    q, k, v = rand(B, T, n_head, n_key), rand(B, T, n_head, n_key, seed=1), rand(B, T, n_head, n_value, seed=2)
    log_decay, beta = negative(B, T, n_head, n_key, seed=3), torch.sigmoid(rand(B, T, n_head, seed=4))
    y = recurrent.gated_delta_rule(q, k, v, log_decay, beta)
    for batch in range(B):
        for head in range(n_head):
            memory = np.zeros((n_key, n_value))
            for t in range(T):
                at = (batch, t, head)
                key, value = k[at].numpy(), v[at].numpy()
                memory = np.exp(log_decay[at].numpy())[:, None] * memory
                memory = memory + np.outer(key, float(beta[at]) * (value - memory.T @ key))
                assert np.allclose(y[at].numpy(), memory.T @ q[at].numpy(), atol=1e-12)


def test_a_memory_that_does_not_fade_gives_back_what_was_written_last() -> None:
    keys = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 1, 3]][None, :, None]
    values = rand(1, 5, 1, 2)
    zeros, ones = torch.zeros(1, 5, 1, dtype=torch.float64), torch.ones(1, 5, 1, dtype=torch.float64)
    asked = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1, 2]][None, :, None]
    read = recurrent.gated_delta_rule(asked, keys, values, zeros, ones)
    assert torch.allclose(read[0, :, 0], values[0, [0, 0, 1, 3, 2], 0], atol=1e-14)


def test_one_decay_a_head_is_the_same_decay_of_every_component() -> None:
    q, k, v = rand(B, T, 2, 4), rand(B, T, 2, 4, seed=1), rand(B, T, 2, 3, seed=2)
    log_decay, beta = negative(B, T, 2, seed=3), torch.sigmoid(rand(B, T, 2, seed=4))
    by_head = recurrent.gated_delta_rule(q, k, v, log_decay, beta)
    by_component = recurrent.gated_delta_rule(q, k, v, log_decay[..., None].expand(-1, -1, -1, 4), beta)
    assert torch.allclose(by_head, by_component)


def test_recurrences_are_differentiable() -> None:
    q = rand(1, 3, 1, 2).requires_grad_()
    k, v = rand(1, 3, 1, 2, seed=1), rand(1, 3, 1, 2, seed=2)
    beta = torch.full((1, 3, 1), 0.5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: recurrent.gated_delta_rule(x, k, v, -beta, beta), (q,))


# -- architectures that have them ------------------------------------------------------------------------


class InOne(Overlay):
    """A Qwen 3 Next as early files keep it: queries, keys, values and gate of each key head in one matrix."""

    def __init__(self, base: SynthSource) -> None:
        super().__init__(base)
        apart = [name for name in base.tensors if name.endswith(("attn_qkv.weight", "attn_gate.weight"))]
        joint = [name.replace("attn_qkv", "ssm_in") for name in apart if "attn_qkv" in name]
        kept = {name: info for name, info in base.tensors.items() if name not in apart}
        self.tensors = kept | {name: TensorInfo(name, (256, 64), "F32", 4 * 256 * 64) for name in joint}

    def read(self, name: str) -> Float32Array:
        if not name.endswith("ssm_in.weight"):
            return super().read(name)
        q, k, v = np.split(super().read(name.replace("ssm_in", "attn_qkv")), [32, 64])
        gate = super().read(name.replace("ssm_in", "attn_gate"))
        by_key_head = [part.reshape(2, -1, 64) for part in (q, k, v, gate)]
        joined: Float32Array = np.concatenate(by_key_head, axis=1).reshape(-1, 64)
        return joined


def test_early_files_of_qwen3next_are_the_same_model() -> None:
    source, ids = SynthSource("qwen3next"), np.arange(40) % 160
    now, early = Reference(source).run([ids]), Reference(InOne(source)).run([ids])
    assert now is not None and early is not None
    assert torch.allclose(now, early, atol=1e-4, rtol=1e-4)


def test_layers_that_predict_further_tokens_are_not_run() -> None:
    metadata = dict(SynthSource("qwen35").metadata)
    more = metadata | {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    more["qwen35.attention.recurrent_layers"] = [*metadata["qwen35.attention.recurrent_layers"], False]
    assert archs.build(more).n_layer == archs.build(metadata).n_layer == 4
    with pytest.raises(UnsupportedError, match="nextn_predict_layers"):
        archs.build(metadata | {"qwen35.nextn_predict_layers": 4})


def test_a_section_that_texts_have_no_position_for_is_refused() -> None:
    metadata = dict(SynthSource("qwen35").metadata)
    assert isinstance(archs.build(metadata | {"qwen35.rope.dimension_sections": [0, 0, 0, 0]}), Qwen35)
    with pytest.raises(UnsupportedError, match="dimension_sections"):
        archs.build(metadata | {"qwen35.rope.dimension_sections": [2, 2, 2, 2]})
