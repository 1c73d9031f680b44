"""Tensors of Mamba's mixers, as pure models and hybrids name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._draw import around, by_width, normal
from diffharness.weights.names._keys import Keys
from diffharness.weights.names._map import PLAIN, Config, Layout, Shaped, TensorRule
from diffharness.weights.names._reorder import MINUS_EXP, Chained, decays

PARTS_EPS = "diffharness.ssm.dt_b_c_epsilon"  # float: of the norms of what dt, b and c are made of
DEFAULT_PARTS_EPS = 1e-6  # in Falcon Mamba, the only model that has them without weights
NORM_FIRST = "diffharness.ssm.norm_before_gate"  # bool: Mamba 2's output is normalised before it is gated
_CONV = by_width(1.6)
_DT = around(-1.0, 0.8, -3.0)
_DECAY = decays(0.1, 2.0)


def convolution(
    blk: str, hf: str, n: int, kernel: int, *, gguf: str = "ssm_conv1d", bias: bool | None
) -> list[TensorRule]:
    """A short convolution of `n` channels; its bias is there, is not (False), or may be there (None)."""
    shape = Shaped((n, kernel), (n, 1, kernel))
    rules = [TensorRule(f"{blk}{gguf}.weight", (n, kernel), (hf + ".weight",), shape, draw=_CONV)]
    if bias is not False:
        rules.append(TensorRule(f"{blk}{gguf}.bias", (n,), (hf + ".bias",), required=bool(bias)))
    return rules


def channel_rules(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    """Mamba 1's mixer under the Hugging Face prefix `hf`."""
    n_embd, inner, rank = keys.n_embd, keys.integer("ssm.inner_size"), keys.integer("ssm.time_step_rank")
    state, kernel = keys.integer("ssm.state_size"), keys.integer("ssm.conv_kernel")
    return [
        TensorRule(blk + "ssm_in.weight", (2 * inner, n_embd), (hf + "in_proj.weight",)),
        TensorRule(blk + "ssm_in.bias", (2 * inner,), (hf + "in_proj.bias",), required=False),
        *convolution(blk, hf + "conv1d", inner, kernel, bias=True),
        TensorRule(blk + "ssm_x.weight", (rank + 2 * state, inner), (hf + "x_proj.weight",)),
        TensorRule(blk + "ssm_dt.weight", (inner, rank), (hf + "dt_proj.weight",)),
        TensorRule(blk + "ssm_dt.bias", (inner,), (hf + "dt_proj.bias",), draw=_DT),
        TensorRule(blk + "ssm_a", (inner, state), (hf + "A_log",), MINUS_EXP, draw=_DECAY),
        TensorRule(blk + "ssm_d", (inner,), (hf + "D",), draw=normal(1.0)),
        TensorRule(blk + "ssm_out.weight", (n_embd, inner), (hf + "out_proj.weight",)),
        TensorRule(blk + "ssm_out.bias", (n_embd,), (hf + "out_proj.bias",), required=False),
    ]


def head_rules(
    keys: Keys,
    blk: str,
    hf: str,
    *,
    norm: bool | None = True,
    conv_bias: bool | None = True,
    scales: Mapping[str, Layout] | None = None,
) -> list[TensorRule]:
    """Mamba 2's mixer under the Hugging Face prefix `hf`.

    Its norm and the convolution's bias are there, are not (False), or may be there (None); `scales` are the layouts
    of tensors that a checkpoint keeps without their multipliers.
    """
    n_embd, inner, n_head = keys.n_embd, keys.integer("ssm.inner_size"), keys.integer("ssm.time_step_rank")
    state, n_group = keys.integer("ssm.state_size"), max(1, keys.integer("ssm.group_count"))
    n_conv = inner + 2 * n_group * state

    def column(first: Layout = PLAIN) -> Layout:
        return Chained((first, Shaped((n_head, 1), (n_head,))))

    rules = [
        TensorRule(blk + "ssm_in.weight", (inner + n_conv + n_head, n_embd), (hf + "in_proj.weight",)),
        TensorRule(blk + "ssm_in.bias", (inner + n_conv + n_head,), (hf + "in_proj.bias",), required=False),
        *convolution(blk, hf + "conv1d", n_conv, keys.integer("ssm.conv_kernel"), bias=conv_bias),
        TensorRule(blk + "ssm_dt.bias", (n_head,), (hf + "dt_bias",), draw=_DT),
        TensorRule(blk + "ssm_a", (n_head, 1), (hf + "A_log",), column(MINUS_EXP), draw=_DECAY),
        TensorRule(blk + "ssm_d", (n_head, 1), (hf + "D",), column(), draw=normal(1.0)),
        TensorRule(blk + "ssm_out.weight", (n_embd, inner), (hf + "out_proj.weight",)),
        TensorRule(blk + "ssm_out.bias", (n_embd,), (hf + "out_proj.bias",), required=False),
    ]
    if norm is not False:
        shape = (n_group, inner // n_group)
        layout = Shaped(shape, (inner,))
        norm_rule = TensorRule(blk + "ssm_norm.weight", shape, (hf + "norm.weight",), layout, draw=around())
        rules.append(replace(norm_rule, required=bool(norm)))
    return [replace(rule, layout=scales[rule.name]) if scales and rule.name in scales else rule for rule in rules]


def expect_unlimited(config: Config) -> None:
    """CheckpointError if a config limits time steps: neither GGUF nor the reference knows of it."""
    low, high = (_number(bound) for bound in config.get("time_step_limit") or (0.0, float("inf")))
    if low > 0.0 or high != float("inf"):
        raise CheckpointError(
            f"config.json: `time_step_limit`: expected time steps without limits, found {low} to {high}"
        )


def _number(value: Any) -> float:
    """A number of config.json, which transformers 5 saves as an object where JSON has none for it (infinity)."""
    return float(value["__float__"] if isinstance(value, dict) else value)
