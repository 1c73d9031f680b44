"""Mamba's two mixers, as pure models and hybrids have them: projection, short convolution, selective scan, gate.

Which optional tensors a mixer has (biases, norms) the file says. Shapes: B batch, T tokens, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffharness.reference import ops, recurrent
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights

NormParts = Callable[[str, Tensor], Tensor]
"""Given `dt`, `b` or `c` and what a projection of Mamba 1 made of it [B, T, n], the same normalised."""


@dataclass(frozen=True)
class MambaSizes:
    """How large a mixer's parts are."""

    inner: int  # channels
    state: int
    rank: int  # Mamba 1: components that dt is made of; Mamba 2: heads
    n_group: int = 1  # Mamba 2: of heads that share b and c

    @classmethod
    def read(cls, hp: HyperParameters, *, heads: bool) -> MambaSizes:
        """From the keys `ssm.*`; with `heads` Mamba 2's, of which channels and groups are to make sense."""
        inner, rank = hp.count("ssm.inner_size"), hp.count("ssm.time_step_rank")
        n_group = hp.count("ssm.group_count") if heads else 1
        if heads and (inner % rank or rank % n_group):
            hp.refuse("ssm.time_step_rank", rank, f"a divisor of {inner} channels and a multiple of {n_group} groups")
        return cls(inner, hp.count("ssm.state_size"), rank, n_group)


def channel_mixer(w: Weights, blk: str, h: Tensor, sizes: MambaSizes, tap: Tap, norm: NormParts | None) -> Tensor:
    """Mamba 1: every channel has a state of its own; [B, T, E] to [B, T, E]."""
    both = ops.project(w, blk + "ssm_in", h)
    tap("ssm_in", both)
    x, gate = both.chunk(2, dim=-1)
    x = F.silu(_convolved(w, blk, x, tap))
    parts = ops.project(w, blk + "ssm_x", x)
    tap("ssm_x", parts)
    dt, b, c = torch.split(parts, [sizes.rank, sizes.state, sizes.state], dim=-1)
    if norm is not None:
        dt, b, c = norm("dt", dt), norm("b", b), norm("c", c)
    dt = ops.project(w, blk + "ssm_dt", dt)
    tap("ssm_dt", dt)
    y = recurrent.selective_scan(x, F.softplus(dt), w.get(blk + "ssm_a"), b, c, w.get(blk + "ssm_d"))
    tap("ssm_scan", y)
    out = ops.project(w, blk + "ssm_out", y * F.silu(gate))
    tap("ssm_out", out)
    return out


def head_mixer(
    w: Weights, blk: str, h: Tensor, sizes: MambaSizes, tap: Tap, *, eps: float, norm_first: bool = False
) -> Tensor:
    """Mamba 2: channels in heads with one decay each; [B, T, E] to [B, T, E].

    The output is gated and then, where the file has the weight, RMS-normalised group by group with `eps`; with
    `norm_first` the other way round.
    """
    n_shared = sizes.n_group * sizes.state
    all_parts = ops.project(w, blk + "ssm_in", h)
    tap("ssm_in", all_parts)
    gate, conv, dt = torch.split(all_parts, [sizes.inner, sizes.inner + 2 * n_shared, sizes.rank], dim=-1)
    conv = F.silu(_convolved(w, blk, conv, tap))
    x, b, c = torch.split(conv, [sizes.inner, n_shared, n_shared], dim=-1)
    dt = dt + w.get(blk + "ssm_dt.bias")
    tap("ssm_dt", dt)
    y = recurrent.head_scan(
        ops.split_heads(x, sizes.rank),
        F.softplus(dt),
        w.get(blk + "ssm_a").flatten(),
        ops.split_heads(b, sizes.n_group),
        ops.split_heads(c, sizes.n_group),
        w.get(blk + "ssm_d").flatten(),
    )
    y = ops.join_heads(y)
    tap("ssm_scan", y)
    weight = w.find(blk + "ssm_norm.weight")
    if weight is None:
        y = y * F.silu(gate)
    elif norm_first:
        y = recurrent.grouped_rms_norm(y, weight, eps, sizes.n_group) * F.silu(gate)
        tap("ssm_norm", y)
    else:
        y = recurrent.grouped_rms_norm(y * F.silu(gate), weight, eps, sizes.n_group)
        tap("ssm_norm", y)
    out = ops.project(w, blk + "ssm_out", y)
    tap("ssm_out", out)
    return out


def _convolved(w: Weights, blk: str, x: Tensor, tap: Tap) -> Tensor:
    x = recurrent.causal_conv(x, w.get(blk + "ssm_conv1d.weight"), w.find(blk + "ssm_conv1d.bias"))
    tap("ssm_conv", x)
    return x
