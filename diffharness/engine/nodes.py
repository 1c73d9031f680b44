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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from diffharness.taps import layer_tap, split

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
    **_norm("token_embd", "token_embd_norm"),
    **_norm("attn_norm", "attn_norm"),
    **_norm("attn_norm_2", "attn_norm_2"),
    **_projection("attn_qkv", "attn_qkv"),
    **_projection("attn_q_a", "attn_q_a"),
    **_norm("attn_q_a_norm", "attn_q_a_norm"),
    **_projection("attn_q", "attn_q_b"),
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
    ("SSM_CONV", "ssm_conv1d.weight"): ("ssm_conv",),
    ("ADD", "ssm_conv1d.bias"): ("ssm_conv",),
    **_projection("ssm_x", "ssm_x"),
    ("ADD", "ssm_dt.bias"): ("ssm_dt",),
    ("MUL", "ssm_a"): ("ssm_decay",),
    **_norm("ssm_norm", "ssm_norm"),
    **_projection("ssm_out", "ssm_out"),
    **_projection("ssm_in", "shortconv.in_proj"),
    ("SSM_CONV", "shortconv.conv.weight"): ("ssm_conv",),
    **_projection("ssm_out", "shortconv.out_proj"),
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

_GRANITE: Mapping[Key, Taps] = {
    **_LLAMA,
    ("SCALE", "embd"): ("token_embd",),
    ("ADD", "ffn_out"): ("ffn_out",),  # with the shared experts
}

_LLAMA4: Mapping[Key, Taps] = {
    **_COMMON,
    ("RMS_NORM", "Qcur_normed"): ("attn_q_rope_norm",),
    ("RMS_NORM", "Kcur_normed"): ("attn_k_rope_norm",),
    (ANY, "ffn_moe_shexp"): ("ffn_shexp",),
    ("ADD", "ffn_moe_out_merged"): ("ffn_out",),
}

_QWEN2MOE: Mapping[Key, Taps] = {
    **{key: taps for key, taps in _COMMON.items() if key != (ANY, "ffn_shexp")},
    ("MUL", "ffn_shexp_out"): ("ffn_shexp",),  # under its gate
    ("ADD", "ffn_out"): ("ffn_out",),
}

_SHARED_EXPERT: Mapping[Key, Taps] = {**_COMMON, ("ADD", "ffn_out"): ("ffn_out",)}

# GLM names the shared experts' output in its own way.
_DEEPSEEK: Mapping[Key, Taps] = {**_SHARED_EXPERT, (ANY, "ffn_shexp_out"): ("ffn_shexp",)}

# Latent attention: queries and keys as they meet, the turned part last.
_LATENT: Mapping[Key, Taps] = {
    **_DEEPSEEK,
    ("CONCAT", "Qcur"): ("attn_q_rope",),
    ("CONCAT", "Kcur"): ("attn_k_rope",),
    ("CONT", "Vcur_cont"): ("attn_v",),
}

_HUNYUAN_MOE: Mapping[Key, Taps] = {**_SHARED_EXPERT, (ANY, "ffn_mlp"): ("ffn_shexp",)}

# Streams side by side: what enters the first layer has a node of its own, beside the embedding of one stream.
_GEMMA3N: Mapping[Key, Taps] = {
    **_SHARED,
    ("CONCAT", "inp_stacked"): ("token_embd",),
    ("ROPE", "Qcur_pos"): ("attn_q_rope",),
    ("ROPE", "Kcur_pos"): ("attn_k_rope",),
    ("RMS_NORM", "Vcur_normed"): ("attn_v_norm",),
    ("SCALE", "attn_laurel"): ("ffn_in",),
}

# Where `post_attention_norm` is the feed-forward's own norm and reads the residual stream.
_POST_IS_FFN_NORM: Mapping[Key, Taps] = {**BY_WEIGHT, **_norm("ffn_norm", "post_attention_norm")}

# Heads are normalised after they were turned.
_NORM_BEHIND_ROPE: Mapping[Key, Taps] = {
    **BY_WEIGHT,
    **_norm("attn_q_rope_norm", "attn_q_norm"),
    **_norm("attn_k_rope_norm", "attn_k_norm"),
}

_KIMI_LINEAR_WEIGHTS: Mapping[Key, Taps] = {
    **BY_WEIGHT,
    ("SSM_CONV", "ssm_conv1d_q.weight (reshaped)"): ("attn_q_conv",),
    ("SSM_CONV", "ssm_conv1d_k.weight (reshaped)"): ("attn_k_conv",),
    ("SSM_CONV", "ssm_conv1d_v.weight (reshaped)"): ("attn_v_conv",),
    ("MUL_MAT", "ssm_g_b.weight"): ("attn_gate",),
    ("UNARY", "kda_beta"): ("ssm_beta",),
    ("MUL", "kda_normed"): ("ssm_norm",),
}
_LFM2_WEIGHTS: Mapping[Key, Taps] = {  # nodes without a name, known by the node that they read
    **BY_WEIGHT,
    **_norm("output_norm", "token_embd_norm"),
    ("ROPE", "model.layers.{}.self_attn.q_layernorm"): ("attn_q_rope",),
    ("ROPE", "model.layers.{}.self_attn.k_layernorm"): ("attn_k_rope",),
    ("ADD", "model.layers.{}.self_attn.out_proj"): ("ffn_in",),
}

BY_WEIGHT_OF: Mapping[str, Mapping[Key, Taps]] = {
    "gemma3n": {key: taps for key, taps in BY_WEIGHT.items() if taps != ("token_embd",)},
    "grok": {
        **{key: taps for key, taps in BY_WEIGHT.items() if taps != ("ffn_out",)},  # what the experts are added to
        **_norm("attn_post_norm", "attn_output_norm"),
        **_norm("ffn_post_norm", "layer_output_norm"),
    },
    "dbrx": {**BY_WEIGHT, **_norm("ffn_norm", "attn_output_norm")},
    "glm4moe": _POST_IS_FFN_NORM,
    "gpt-oss": _POST_IS_FFN_NORM,
    "hunyuan-dense": _NORM_BEHIND_ROPE,
    "hunyuan-moe": _NORM_BEHIND_ROPE,
    "seed_oss": _POST_IS_FFN_NORM,
    "qwen3next": _POST_IS_FFN_NORM,
    "qwen35": _POST_IS_FFN_NORM,
    "qwen35moe": _POST_IS_FFN_NORM,
    "jamba": {**BY_WEIGHT, ("ADD", "ffn_inp"): ("ffn_in",)},  # the sum has no name, what is added to it has this one
    "kimi-linear": _KIMI_LINEAR_WEIGHTS,
    "lfm2": _LFM2_WEIGHTS,
    "lfm2moe": _LFM2_WEIGHTS,
}


_GPT2: Mapping[Key, Taps] = {**_COMMON, ("ADD", "inpL"): ("token_embd",)}  # with the positions' vectors
_MAMBA: Mapping[Key, Taps] = {**_COMMON, ("ADD", "mamba2_y_add_d"): ("ssm_scan",)}
_FALCON_H1: Mapping[Key, Taps] = {
    **_MAMBA,
    ("ROPE", "Qcur-post-rope"): ("attn_q_rope",),
    ("ROPE", "Kcur-post-rope"): ("attn_k_rope",),
    (ANY, "ffn_inp"): ("ffn_in",),  # in the last layer the wanted rows of it
    ("MUL", "ffn_norm"): ("ffn_norm",),  # its weight's name has no `.weight`
}
_NEMOTRON_H: Mapping[Key, Taps] = {
    **{key: taps for key, taps in _MAMBA.items() if key != (ANY, "l_out")},
    ("ADD", "l_out"): ("ffn_out",),  # what a feed-forward gives, before it is added
    ("ADD", "nemotron_h_block_out"): ("layer_out",),
}
_KIMI_LINEAR: Mapping[Key, Taps] = {
    **_COMMON,
    ("MUL", "kda_g1"): ("ssm_decay",),
    ("CONT", "attn_output"): ("ssm_scan",),
    ("ADD", "ffn_out"): ("ffn_out",),
}
_DELTA: Mapping[Key, Taps] = {  # delta rules and gated attention of Qwen 3 Next and 3.5
    **_SHARED,
    **_ROPE,
    (ANY, "attn_pregate"): ("attn_ctx",),
    ("UNARY", "gate_sigmoid"): ("attn_gate",),
    ("UNARY", "beta_sigmoid"): ("ssm_beta",),
    ("VIEW", "attn_output"): ("ssm_scan",),
    (ANY, "final_output"): ("ssm_norm",),
    ("ADD", "attn_residual"): ("ffn_in",),
    (ANY, "ffn_moe_out"): ("moe_experts",),
    (ANY, "ffn_shexp_gated"): ("ffn_shexp",),
    ("ADD", "ffn_out"): ("ffn_out",),
}

_COHERE2MOE: Mapping[Key, Taps] = {
    **_LLAMA,
    ("SCALE", "ffn_out"): ("ffn_out",),  # half of routed and shared experts together
}

_MINICPM3: Mapping[Key, Taps] = {
    **_LLAMA,
    **_SCALED,
    ("ROPE", "q_states"): ("attn_q_rope",),
    ("CONCAT", "k_states"): ("attn_k_rope",),
    ("CONT", "v_states"): ("attn_v",),
}

_OLMO: Mapping[Key, Taps] = {  # norms without weights
    **_LLAMA,
    ("NORM", "attn_norm"): ("attn_norm",),
    ("NORM", "ffn_norm"): ("ffn_norm",),
    ("NORM", "result_norm"): ("output_norm",),
}

_MPT: Mapping[Key, Taps] = {**_GPT2, ("DIV", "ffn_act"): ("ffn_act",)}  # AWQ's scales

# Taps whose nodes have the axes width, tokens, streams; of others the tokens are the last.
STREAMS: Mapping[str, frozenset[str]] = {"gemma3n": frozenset({"token_embd", "layer_out"})}

BY_NAME: Mapping[str, Mapping[Key, Taps]] = {
    "gemma": _GEMMA,
    "minicpm": _GRANITE,
    "minicpm3": _MINICPM3,
    "olmo": _OLMO,
    "olmoe": _LLAMA,
    "cohere2moe": _COHERE2MOE,
    "gpt2": _GPT2,
    "mpt": _MPT,
    "phimoe": _LLAMA,
    "bailingmoe": _DEEPSEEK,
    "bailingmoe2": {**_DEEPSEEK, ("ADD", "sa_out"): ("ffn_in",)},
    "deepseek": _DEEPSEEK,
    "deepseek2": _LATENT,
    "dots1": _DEEPSEEK,
    "glm4moe": _DEEPSEEK,
    "exaone-moe": _DEEPSEEK,
    "gpt-oss": _LLAMA,
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "ernie4_5-moe": _SHARED_EXPERT,
    "hunyuan-moe": _HUNYUAN_MOE,
    "dbrx": _LLAMA,
    "grok": {**_LLAMA, ("SCALE", "embd"): ("token_embd",), ("SCALE", "ffn_out"): ("ffn_out",)},
    "minimax-m2": _LLAMA,
    "llama": _LLAMA,
    "llama4": _LLAMA4,
    "mistral3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2moe": _QWEN2MOE,
    "qwen2vl": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3vl": _LLAMA,
    "qwen3vlmoe": _LLAMA,
    "qwen3moe": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3n": _GEMMA3N,
    "gemma4": _GEMMA4,
    "mamba2": _MAMBA,
    "falcon-h1": _FALCON_H1,
    "jamba": _LLAMA,
    "kimi-linear": _KIMI_LINEAR,
    "lfm2": _LLAMA,
    "lfm2moe": _LLAMA,
    "granitehybrid": {**_GRANITE, **_MAMBA, (ANY, "ffn_moe_out"): ("moe_experts",)},
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": _NEMOTRON_H,
    "qwen3next": _DELTA,
    "qwen35": _DELTA,
    "qwen35moe": _DELTA,
}

_WEIGHT = re.compile(r"blk\.(?P<layer>\d+)\.(?P<stem>.+)")
_NODE = re.compile(r"(?P<stem>.+)-(?P<layer>\d+)")


@dataclass(frozen=True)
class NodeTable:
    """The taps of one architecture's graph."""

    by_name: Mapping[Key, Taps]
    by_weight: Mapping[Key, Taps] = field(default_factory=lambda: BY_WEIGHT)
    streams: frozenset[str] = frozenset()  # taps without `blk.N.`

    def match(self, name: str, op: str, sources: Sequence[str]) -> list[str]:
        """Full names of the taps whose value this node holds; usually none or one."""
        found = []
        for source in sources:
            found += _look_up(self.by_weight, op, source, _WEIGHT.fullmatch(source) or _NODE.fullmatch(source))
        found += _look_up(self.by_name, op, name, _NODE.fullmatch(name))
        return list(dict.fromkeys(found))

    def holders(self, tap: str, has: Callable[[str], bool]) -> list[str]:
        """The nodes that may hold a tap, in words: `MUL_MAT of blk.3.attn_q.weight`, `ROPE Qcur-3`.

        `has` tells of a tensor whether the file has it.
        """
        layer, name = split(tap)
        found = []
        for (op, stem), taps in self.by_weight.items():
            tensor = stem if layer is None else layer_tap(layer, stem)
            if name in taps and has(tensor):
                found.append(f"{op} of {tensor}")
        for (op, stem), taps in self.by_name.items():
            if name in taps:
                node = stem if layer is None else f"{stem}-{layer}"
                found.append(node if op == ANY else f"{op} {node}")
        return found


def _look_up(table: Mapping[Key, Taps], op: str, text: str, inside: re.Match[str] | None) -> list[str]:
    stem = inside["stem"] if inside else text
    taps = table.get((op, stem), table.get((ANY, stem), ()))
    return [layer_tap(int(inside["layer"]), tap) for tap in taps] if inside else list(taps)


def table_for(arch: str) -> NodeTable:
    """The table of an architecture: its own, or the common one."""
    return NodeTable(BY_NAME.get(arch, _COMMON), BY_WEIGHT_OF.get(arch, BY_WEIGHT), STREAMS.get(arch, frozenset()))


def is_wanted(tap: str, patterns: Sequence[str] | None) -> bool:
    """Whether a tap is asked for; patterns as in a shell (`blk.*.layer_out`), None for all taps."""
    return patterns is None or any(fnmatchcase(tap, pattern) for pattern in patterns)
