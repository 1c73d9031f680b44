"""`dbrx`: Databricks' DBRX.

Each of an expert's three matrices is a run of rows in one tensor of all experts; the last of the three is transposed.
The epsilon of the norms is the class's own. Experts' weights that do not sum to one (`moe_normalize_expert_weights`
null) have no GGUF key, and are told by one of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import layer_norm_metadata
from diffharness.weights.names._config import need_int
from diffharness.weights.names._draw import by_width
from diffharness.weights.names._keys import TIED_HEAD, Keys, head_rules, matrix, vector
from diffharness.weights.names._map import ArchMap, Config, Mapped, Shaped, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "dbrx"
_EPS = 1e-5
PLAIN_WEIGHTS = "diffharness.expert_weights_plain"  # bool: experts' weights are left as the softmax made them


def metadata(config: Config) -> dict[str, Any]:
    attn, ffn = _part(config, "attn_config"), _part(config, "ffn_config")
    act = ffn.get("ffn_act_fn") or {"name": "silu"}
    if act.get("name") != "silu":
        raise CheckpointError(f"config.json: `ffn_act_fn`: expected silu, found {act!r}")
    norm = ffn.get("moe_normalize_expert_weights", 1.0)
    if norm not in (None, 1.0):
        raise CheckpointError(f"config.json: `moe_normalize_expert_weights`: expected 1 or null, found {norm!r}")
    theta = attn.get("rope_theta")
    in_their_words = {
        "num_hidden_layers": need_int(config, "n_layers"),
        "num_attention_heads": need_int(config, "n_heads"),
        "num_key_value_heads": int(attn.get("kv_n_heads", 1)),
        "hidden_size": need_int(config, "d_model"),
        "max_position_embeddings": need_int(config, "max_seq_len"),
        "intermediate_size": int(ffn.get("ffn_hidden_size", 3584)),
        "layer_norm_eps": _EPS,
        **({"rope_theta": theta, "rope_parameters": None} if theta else {}),
    }
    out = layer_norm_metadata({**config, **in_their_words}, _ARCH) | {
        f"{_ARCH}.attention.clamp_kqv": float(attn.get("clip_qkv") or 0.0),
        f"{_ARCH}.expert_count": int(ffn.get("moe_num_experts", 4)),
        f"{_ARCH}.expert_used_count": int(ffn.get("moe_top_k", 1)),
    }
    return out | ({PLAIN_WEIGHTS: True} if norm is None else {})


def _part(config: Config, key: str) -> Mapping[str, Any]:
    part = config.get(key) or {}
    if not isinstance(part, Mapping):
        raise CheckpointError(f"config.json: `{key}`: expected an object, found {type(part).__name__}")
    return part


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": keys.n_embd,
        "n_heads": keys.n_head,
        "n_layers": keys.n_layer,
        "max_seq_len": keys["context_length"],
        "vocab_size": keys.n_vocab,
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "attn_config": {
            "clip_qkv": keys.get("attention.clamp_kqv", 0.0) or None,
            "kv_n_heads": keys.n_head_kv,
            "rope_theta": keys.get("rope.freq_base", 10000.0),
        },
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": keys["feed_forward_length"],
            "moe_num_experts": keys["expert_count"],
            "moe_top_k": keys["expert_used_count"],
            "moe_normalize_expert_weights": None if metadata.get(PLAIN_WEIGHTS) else 1.0,
        },
        "tie_word_embeddings": bool(metadata.get(TIED_HEAD, False)),
        "dtype": "float32",
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, q = keys.n_embd, keys.n_head * keys.head_dim
    qkv = q + 2 * keys.n_head_kv * keys.head_dim
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("transformer.wte.weight",)),
        vector("", "output_norm", "transformer.norm_f", n_embd),
        *head_rules(metadata),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"transformer.blocks.{il}."
        attn = hf + "norm_attn_norm."
        out += [
            vector(blk, "attn_norm", attn + "norm_1", n_embd),
            *matrix(blk, "attn_qkv", attn + "attn.Wqkv", qkv, n_embd),
            *matrix(blk, "attn_output", attn + "attn.out_proj", n_embd, q),
            vector(blk, "attn_output_norm", attn + "norm_2", n_embd),
            *matrix(blk, "ffn_gate_inp", hf + "ffn.router.layer", keys.n_expert, n_embd),
            *_expert_rules(keys, blk, hf + "ffn.experts.mlp."),
        ]
    return out


def _expert_rules(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    n_expert, n_embd, n_ff = keys.n_expert, keys.n_embd, keys.integer("feed_forward_length")
    wide, rows = (n_expert, n_ff, n_embd), (n_expert * n_ff, n_embd)
    down = Mapped(lambda x: x.reshape(wide).transpose(0, 2, 1), lambda x: x.transpose(0, 2, 1).reshape(rows))
    return [
        TensorRule(blk + "ffn_gate_exps.weight", wide, (hf + "w1",), layout=Shaped(wide, rows)),
        TensorRule(blk + "ffn_up_exps.weight", wide, (hf + "v1",), layout=Shaped(wide, rows)),
        TensorRule(blk + "ffn_down_exps.weight", (n_expert, n_embd, n_ff), (hf + "w2",), layout=down, draw=by_width()),
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "d_model": sizes.n_embd,
        "n_heads": sizes.n_head,
        "n_layers": sizes.n_layer,
        "max_seq_len": sizes.n_ctx,
        "vocab_size": sizes.n_vocab,
        "rope_theta": 5e3,
        "attn_config": {"clip_qkv": 1.0, "kv_n_heads": sizes.n_head_kv, "rope_theta": 5e3},
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": sizes.n_ff_expert,
            "moe_num_experts": sizes.n_expert,
            "moe_top_k": sizes.n_expert_used,
            "moe_normalize_expert_weights": 1.0,
        },
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


MAP = ArchMap(
    arch=_ARCH,
    model_types=("dbrx",),
    architectures=("DbrxForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
