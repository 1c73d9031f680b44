"""`qwen3next`: Qwen 3 Next. Gated delta rules and gated attention, experts in every layer.

A checkpoint keeps queries, keys, values and gate of a delta-rule layer in one projection, group by group: the rows of
one key head's query, of its key, of the values of all heads that it serves, of their gates. GGUF has one matrix of all
queries, all keys, all values, and one of the gates; early files have the checkpoint's (`ssm_in`). Norm weights, but for
that of the delta rule's output, are kept as w - 1 in the checkpoint. Tensors of `mtp.` predict further tokens and are
not part of the model proper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffharness.weights.names._blocks import fused_or_not
from diffharness.weights.names._keys import Keys
from diffharness.weights.names._map import ArchMap, Config, Piece, Sizes, TensorRule
from diffharness.weights.names._qwen_next import experts_example, next_example, next_metadata
from diffharness.weights.names._qwen_next_tensors import (
    CONV_DRAW,
    DT_DRAW,
    DeltaSizes,
    attention_rules,
    further_rules,
    is_recurrent,
    moe_rules,
    norm_rules,
    outer_rules,
    rule,
)
from diffharness.weights.names._reorder import MINUS_EXP, Pieces, decays
from diffharness.weights.names._shared_experts import n_main_layers
from diffharness.weights.source import Float32Array, Metadata

_ARCH = "qwen3next"


def metadata(config: Config) -> dict[str, Any]:
    return next_metadata(config, _ARCH)


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    out = outer_rules(metadata)
    for il in range(n_main_layers(keys)):
        blk, hf = f"blk.{il}.", f"layers.{il}."
        mixer = _delta_rules(metadata, blk, hf) if is_recurrent(keys, il) else attention_rules(keys, blk, hf)
        out += [*norm_rules(blk, hf, keys.n_embd), *mixer, *moe_rules(metadata, blk, hf)]
    return out + further_rules(metadata, experts=True)


def _delta_rules(metadata: Metadata, blk: str, hf: str) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, d, attn = keys.n_embd, DeltaSizes.of(keys), hf + "linear_attn."
    values = d.n_values // d.n_key_head  # rows of the values that one key head serves
    whole = (d.n_key_head, 2 * d.key_size + 2 * values, n_embd)

    def part(start: int, n: int) -> Callable[[Float32Array], Float32Array]:
        return lambda w: w.reshape(whole)[:, start : start + n]

    q, k = part(0, d.key_size), part(d.key_size, d.key_size)
    v, z = part(2 * d.key_size, values), part(2 * d.key_size + values, values)
    hf_shape = (2 * d.n_keys + 2 * d.n_values, n_embd)
    joint = attn + "in_proj_qkvz.weight"
    qkv, gate = Pieces(hf_shape, q, others=(k, v)), Piece(hf_shape, z)
    apart = [
        rule(blk + "attn_qkv.weight", (d.n_conv, n_embd), joint, layout=qkv),
        rule(blk + "attn_gate.weight", (d.n_values, n_embd), joint, layout=gate),
    ]
    return [
        *fused_or_not(metadata, apart, [TensorRule(blk + "ssm_in.weight", hf_shape)]),
        rule(blk + "ssm_ba.weight", (2 * d.n_value_head, n_embd), attn + "in_proj_ba.weight"),
        rule(
            blk + "ssm_conv1d.weight",
            (d.n_conv, d.kernel),
            attn + "conv1d.weight",
            layout=d.conv_shape,
            draw=CONV_DRAW,
        ),
        rule(blk + "ssm_dt.bias", (d.n_value_head,), attn + "dt_bias", draw=DT_DRAW),
        rule(blk + "ssm_a", (d.n_value_head,), attn + "A_log", layout=MINUS_EXP, draw=decays(0.05, 1.0)),
        rule(blk + "ssm_norm.weight", (d.value_size,), attn + "norm.weight"),
        rule(blk + "ssm_out.weight", (n_embd, d.n_values), attn + "out_proj.weight"),
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    return next_example(sizes, "qwen3_next", "Qwen3NextForCausalLM", **experts_example(sizes))


MAP = ArchMap(
    arch=_ARCH,
    model_types=("qwen3_next",),
    architectures=("Qwen3NextForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
    ignored=("mtp.", "model.mtp."),
)
