"""Queries, keys and values that a checkpoint keeps in one matrix, and GGUF in three."""

from __future__ import annotations

from diffharness.weights.names._keys import Keys
from diffharness.weights.names._map import Piece, TensorRule
from diffharness.weights.source import Float32Array


def fused_qkv_parts(keys: Keys, blk: str, hf: str, *, grouped: bool = False) -> list[TensorRule]:
    """`attn_q`, `attn_k`, `attn_v` of the one matrix `hf`.weight, Q and K permuted to interleaved rotary pairs.

    The matrix has all queries' rows, all keys', all values'; with `grouped`, for each KV head its queries', its key's
    and its value's. Biases may be there. `blk` is the GGUF prefix (`blk.3.`).
    """
    size, n_kv = keys.head_dim, keys.n_head_kv
    groups = max(1, n_kv) if grouped else 1
    heads = [n // groups for n in (keys.n_head, n_kv, n_kv)]  # of each group
    rules, first = [], 0
    for name, n in zip(("attn_q", "attn_k", "attn_v"), heads, strict=True):
        for kind, inner in (("weight", (keys.n_embd,)), ("bias", ())):
            piece = _heads((groups, sum(heads), size, *inner), slice(first, first + n), turned=name != "attn_v")
            shape = (groups * n * size, *inner)
            rules.append(TensorRule(f"{blk}{name}.{kind}", shape, (f"{hf}.{kind}",), piece, kind == "weight"))
        first += n
    return rules


def _heads(shape: tuple[int, ...], part: slice, *, turned: bool) -> Piece:
    """Some heads of each group of a whole [groups, heads, head size, ...]; `turned`: half-split pairs to neighbours."""
    groups, n_heads, size, *inner = shape

    def view(whole: Float32Array) -> Float32Array:
        rows = whole.reshape(shape)[:, part]
        return rows.reshape(groups, -1, 2, size // 2, *inner).swapaxes(2, 3) if turned else rows

    return Piece((groups * n_heads * size, *inner), view)
