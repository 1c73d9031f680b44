"""Which node of llama.cpp's graph holds the value of which tap, per architecture.

A node is known by what it multiplies or adds where it has a weight (`blk.3.attn_q.weight`), because
weights are named by the file and nodes by a programmer, who may leave a name out (gemma's output
projection) or give one to several nodes (`Kcur-3` before and after RoPE, `ffn_out-3` for the
projection and, in llama, for the sum that follows). Nodes without a weight are known by name and op.
Where several nodes of one graph match a tap the last one holds its value: a projection, then the
same with its bias. Found by dumping graphs and reading llama.cpp's src/models. Standard library only.

`logits` is missing on purpose: it is read through llama_get_logits, as every user reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from diffharness.taps import layer_tap

Key = tuple[str, str]  # (op, tensor below `blk.N.`) or (op, node name without `-N`)
Taps = tuple[str, ...]

ANY = "*"  # any op


def _projection(tap: str, tensor: str) -> dict[Key, Taps]:
    """A matrix product with the scale and the bias that may follow it."""
    return dict.fromkeys(
        (("MUL_MAT", f"{tensor}.weight"), ("MUL", f"{tensor}.scale"), ("ADD", f"{tensor}.bias")), (tap,)
    )


def _norm(tap: str, tensor: str) -> dict[Key, Taps]:
    """A norm's product with its weight and the sum with the bias that may follow it."""
    return {("MUL", f"{tensor}.weight"): (tap,), ("ADD", f"{tensor}.bias"): (tap,)}


# The same for every architecture: GGUF's tensor names say what a weight is for.
BY_WEIGHT: Mapping[Key, Taps] = {
    ("GET_ROWS", "token_embd.weight"): ("token_embd",),
    **_norm("attn_norm", "attn_norm"),
    **_projection("attn_qkv", "attn_qkv"),
    **_projection("attn_q_a", "attn_q_a"),
    **_norm("attn_q_a_norm", "attn_q_a_norm"),
    **_projection("attn_kv_a", "attn_kv_a_mqa"),
    **_norm("attn_kv_a_norm", "attn_kv_a_norm"),
    **_projection("attn_q", "attn_q"),
    **_projection("attn_k", "attn_k"),
    **_projection("attn_v", "attn_v"),
    **_norm("attn_q_norm", "attn_q_norm"),
    **_norm("attn_k_norm", "attn_k_norm"),
    **_projection("attn_out", "attn_output"),
    **_projection("attn_gate", "attn_gate"),
    **_norm("attn_sub_norm", "attn_sub_norm"),
    **_projection("ssm_in", "ssm_in"),
    **_projection("ssm_out", "ssm_out"),
    **_norm("attn_post_norm", "post_attention_norm"),
    **_norm("ffn_norm", "ffn_norm"),
    ("MUL_MAT", "ffn_gate_inp.weight"): ("moe_logits",),  # its .scale belongs to the router's input
    ("ADD", "ffn_gate_inp.bias"): ("moe_logits",),
    **_projection("ffn_gate", "ffn_gate"),
    **_projection("ffn_up", "ffn_up"),
    **_projection("ffn_out", "ffn_down"),
    **_norm("ffn_post_norm", "post_ffw_norm"),
    **_norm("output_norm", "output_norm"),
}

# Nodes that build_attn and build_ffn of llama-graph.cpp name for every architecture.
_SHARED: Mapping[Key, Taps] = {
    (ANY, "kqv_out"): ("attn_ctx",),  # CONT after plain attention, RESHAPE after flash attention
    ("GLU", "ffn_swiglu"): ("ffn_act",),
    ("GLU", "ffn_geglu"): ("ffn_act",),
    ("GLU", "ffn_reglu"): ("ffn_act",),
    ("UNARY", "ffn_silu"): ("ffn_act",),
    ("UNARY", "ffn_gelu"): ("ffn_act",),
    ("UNARY", "ffn_relu"): ("ffn_act",),
    ("SQR", "ffn_sqr(relu)"): ("ffn_act",),
    (ANY, "l_out"): ("layer_out",),
}
_ROPE: Mapping[Key, Taps] = {("ROPE", "Qcur"): ("attn_q_rope",), ("ROPE", "Kcur"): ("attn_k_rope",)}
_SCALED: Mapping[Key, Taps] = {("SCALE", "inp_scaled"): ("token_embd",)}

# What most graphs have: an architecture that is not in BY_NAME has this.
_COMMON: Mapping[Key, Taps] = {
    **_SHARED,
    **_ROPE,
    ("ADD", "ffn_inp"): ("ffn_in",),
    (ANY, "ffn_moe_out"): ("moe_experts",),
    (ANY, "ffn_shexp"): ("ffn_shexp",),
}
_LLAMA: Mapping[Key, Taps] = {
    **_COMMON,
    (ANY, "ffn_moe_out"): ("moe_experts", "ffn_out"),  # nothing but the experts is added to the residual
}
_GEMMA: Mapping[Key, Taps] = {**_SHARED, **_ROPE, **_SCALED, ("ADD", "sa_out"): ("ffn_in",)}
_GEMMA4: Mapping[Key, Taps] = {
    **_SHARED,
    **_SCALED,
    ("ROPE", "Qcur_pos"): ("attn_q_rope",),
    ("ROPE", "Kcur_pos"): ("attn_k_rope",),
    ("MUL_MAT", "Vcur"): ("attn_v",),  # the key projection itself where a layer has no value projection
    ("RMS_NORM", "Vcur_normed"): ("attn_v_norm",),
    ("ADD", "attn_out"): ("ffn_in",),
    (ANY, "ffn_moe_out"): ("moe_experts",),
    ("ADD", "ffn_moe_combined"): ("ffn_out",),  # dense and routed part together
}

BY_NAME: Mapping[str, Mapping[Key, Taps]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3moe": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma4": _GEMMA4,
}

_WEIGHT = re.compile(r"blk\.(?P<layer>\d+)\.(?P<stem>.+)")
_NODE = re.compile(r"(?P<stem>.+)-(?P<layer>\d+)")


@dataclass(frozen=True)
class NodeTable:
    """The taps of one architecture's graph."""

    by_name: Mapping[Key, Taps]
    by_weight: Mapping[Key, Taps] = field(default_factory=lambda: BY_WEIGHT)

    def match(self, name: str, op: str, sources: Sequence[str]) -> list[str]:
        """Full names of the taps whose value this node holds; usually none or one."""
        found = []
        for source in sources:
            found += _look_up(self.by_weight, op, source, _WEIGHT.fullmatch(source))
        found += _look_up(self.by_name, op, name, _NODE.fullmatch(name))
        return list(dict.fromkeys(found))


def _look_up(table: Mapping[Key, Taps], op: str, text: str, inside: re.Match[str] | None) -> list[str]:
    stem = inside["stem"] if inside else text
    taps = table.get((op, stem), table.get((ANY, stem), ()))
    return [layer_tap(int(inside["layer"]), tap) for tap in taps] if inside else list(taps)


def table_for(arch: str) -> NodeTable:
    """The table of an architecture: its own, or the common one."""
    return NodeTable(BY_NAME.get(arch, _COMMON))


def is_wanted(tap: str, patterns: Sequence[str] | None) -> bool:
    """Whether a tap is asked for; patterns as in a shell (`blk.*.layer_out`), None for all taps."""
    return patterns is None or any(fnmatchcase(tap, pattern) for pattern in patterns)
