"""Taps: the named places of a forward whose value both sides expose, in graph order.

A full name is `blk.N.<tap>` inside a layer, and plain outside of one. A tap's value is a float32
array [n_tokens, width]; heads are joined in order, experts too. Standard library only.
"""

from __future__ import annotations

# An order in which every architecture could be computed: within a layer no tap depends on a later one, so that the
# first that differs does so by what comes between it and the taps before. `first divergence` relies on it. Both sides
# compute in orders of their own: of taps that do not depend on each other, either may come first.
BEFORE_LAYERS = ("token_embd",)
LAYER_TAPS = (
    "attn_norm",
    "attn_norm_2",  # the attention's own, where `attn_norm` is the feed-forward's
    "attn_qkv",  # queries, keys and values of one matrix
    "attn_q_a",  # latent attention: the compressed query, and normalised
    "attn_q_a_norm",
    "attn_kv_a",  # the compressed key and value, with the turned part of the key
    "attn_kv_a_norm",
    "attn_q",
    "attn_q_norm",
    "attn_q_rope",
    "attn_q_rope_norm",  # in models that normalise what is turned
    "attn_k",
    "attn_k_norm",
    "attn_k_rope",
    "attn_k_rope_norm",
    "attn_v",
    "attn_v_norm",
    "attn_q_conv",  # after a short convolution of queries alone, before its activation
    "attn_k_conv",
    "attn_v_conv",
    "attn_gate",  # what gates heads or a recurrent layer's output
    "attn_ctx",  # heads joined, before the output projection
    "attn_sub_norm",
    "ssm_in",  # a recurrent layer's input projection
    "ssm_conv",  # after the short convolution, before its activation
    "ssm_x",  # what a recurrent layer makes of itself: dt, b and c
    "ssm_dt",  # time steps before their softplus
    "ssm_decay",  # logarithms of a delta rule's decays
    "ssm_beta",  # how strongly a delta rule writes to its memory
    "ssm_scan",  # what the recurrence gives
    "ssm_norm",
    "ssm_out",
    "attn_out",  # after the output projection
    "attn_post_norm",
    "ffn_in",  # the residual after attention
    "ffn_norm",
    "moe_logits",
    "ffn_gate",
    "ffn_up",
    "ffn_act",  # activation(gate) * up
    "moe_experts",  # the routed experts' weighted sum
    "ffn_shexp",  # the shared experts' output
    "ffn_out",
    "ffn_post_norm",
    "layer_out",
)
AFTER_LAYERS = ("output_norm", "logits")

_RANK = {name: i for i, name in enumerate(LAYER_TAPS)}


def layer_tap(layer: int, tap: str) -> str:
    """`blk.3.attn_q` for (3, "attn_q")."""
    return f"blk.{layer}.{tap}"


def split(name: str) -> tuple[int | None, str]:
    """(3, "attn_q") for `blk.3.attn_q`; (None, name) outside of the layers."""
    if not name.startswith("blk."):
        return None, name
    _, layer, tap = name.split(".", 2)
    return int(layer), tap


def graph_order(name: str) -> tuple[int, int, int]:
    """Sort key that puts taps in an order in which none depends on a later one."""
    layer, tap = split(name)
    if layer is not None:
        return 1, layer, _RANK.get(tap, len(_RANK))
    if tap in BEFORE_LAYERS:
        return 0, 0, BEFORE_LAYERS.index(tap)
    return 2, 0, AFTER_LAYERS.index(tap) if tap in AFTER_LAYERS else len(AFTER_LAYERS)
