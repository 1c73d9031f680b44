"""Attention and feed-forward of decoders whose rows stand in one order on both sides (rope turns halves of a head)."""

from __future__ import annotations

from diffharness.weights.names._keys import Keys, matrix
from diffharness.weights.names._map import TensorRule

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


def attention_matrices(
    keys: Keys, blk: str, hf: str, names: tuple[str, ...] = ATTENTION, *, out_bias: bool | None = False
) -> list[TensorRule]:
    """Projections of queries, keys and values, which may have biases, and of the heads' output.

    `blk` is the GGUF prefix (`blk.3.`), `hf` the Hugging Face prefix, `names` the four matrices' names below it.
    """
    n_embd, size = keys.n_embd, keys.head_dim
    widths = (keys.n_head * size, keys.n_head_kv * size, keys.n_head_kv * size)
    out = []
    for gguf, name, width in zip(("attn_q", "attn_k", "attn_v"), names, widths, strict=False):
        out += matrix(blk, gguf, hf + name, width, n_embd, bias=None)
    return out + matrix(blk, "attn_output", hf + names[3], n_embd, widths[0], bias=out_bias)


def gated_matrices(
    keys: Keys, blk: str, hf: str, names: tuple[str, ...] = GATED, *, bias: bool | None = False
) -> list[TensorRule]:
    """Gate, up and down of a dense feed-forward."""
    n_embd, n_ff = keys.n_embd, keys.integer("feed_forward_length")
    gate, up, down = names
    return [
        *matrix(blk, "ffn_gate", hf + gate, n_ff, n_embd, bias=bias),
        *matrix(blk, "ffn_up", hf + up, n_ff, n_embd, bias=bias),
        *matrix(blk, "ffn_down", hf + down, n_embd, n_ff, bias=bias),
    ]
