"""`mpt`: MPT 7B and 30B, SEA-LION. One matrix for queries, keys and values in that order; no biases.

llm-foundry's definition, of which transformers has a part: no learned positions, no norms of queries and keys, no
biases, no grouped KV heads. GGUF has no key for the activation, GELU with erf unless `ffn_config` says otherwise.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_int
from diffharness.weights.names._draw import normal
from diffharness.weights.names._gpt import ACTIVATION, affine, fused_qkv, gpt_metadata, optional
from diffharness.weights.names._keys import TIED_HEAD, Keys, head_rules, matrix
from diffharness.weights.names._map import PLAIN, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

BIASES = "diffharness.biases"  # bool: projections and norms have biases
QK_NORM = "diffharness.qk_layernorm"  # bool

_PLAIN = {"softmax_scale": None, "prefix_lm": False, "rope": False, "qk_gn": False, "sliding_window_size": -1}
_NORMS = ("low_precision_layernorm", "layernorm")


def metadata(config: Config) -> dict[str, Any]:
    attn: dict[str, Any] = dict(config.get("attn_config") or {})
    for key, value in _PLAIN.items():
        if attn.get(key, value) != value:
            raise CheckpointError(f"config.json: `attn_config.{key}`: expected {value}, found {attn[key]!r}")
    if config.get("logit_scale") is not None or config.get("norm_type", _NORMS[0]) not in _NORMS:
        raise CheckpointError(f"config.json: expected no `logit_scale` and a `norm_type` of {' or '.join(_NORMS)}")
    n_embd, n_head = need_int(config, "d_model"), need_int(config, "n_heads")
    out = gpt_metadata(
        "mpt",
        n_layer=need_int(config, "n_layers"),
        n_ctx=need_int(config, "max_seq_len"),
        n_embd=n_embd,
        n_ff=config.get("expansion_ratio", 4) * n_embd,
        n_head=n_head,
        n_head_kv=1 if attn.get("attn_type") == "multiquery_attention" else attn.get("kv_n_heads"),
        eps=float(config.get("layer_norm_epsilon", 1e-5)),
        n_vocab=need_int(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", True)),
    )
    if attn.get("clip_qkv"):
        out["mpt.attention.clamp_kqv"] = float(attn["clip_qkv"])
    return out | {
        "mpt.attention.max_alibi_bias": float(attn.get("alibi_bias_max", 8)) if attn.get("alibi", True) else 0.0,
        ACTIVATION: _activation(config),
        BIASES: not config.get("no_bias", True),
        QK_NORM: bool(attn.get("qk_ln", False)),
    }


def _activation(config: Config) -> str:
    act = (config.get("ffn_config") or {}).get("ffn_act_fn") or {"name": "gelu"}
    if act.get("name") != "gelu":
        raise CheckpointError(f"config.json: `ffn_config.ffn_act_fn`: expected gelu, found {act.get('name')!r}")
    return "gelu" if act.get("approximate", "none") == "tanh" else "gelu_erf"


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, kv = keys.n_embd, keys.integer("feed_forward_length"), keys.n_head_kv * keys.head_dim
    of_checkpoint, bias = TIED_HEAD in metadata, metadata.get(BIASES)
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("transformer.wte.weight",)),
        *affine("", "output_norm", "transformer.norm_f", n_embd, bias=bias),
        *head_rules(metadata),
    ]
    if not (of_checkpoint and keys["attention.max_alibi_bias"]):
        shape = (keys.integer("context_length"), n_embd)
        wpe = ("transformer.wpe.weight",)
        out.append(TensorRule("position_embd.weight", shape, wpe, required=of_checkpoint, draw=normal(0.7)))
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"transformer.blocks.{il}."
        attn, sizes = hf + "attn.", (n_embd, kv, kv)
        norms = [
            rule
            for name, size in (("q", n_embd), ("k", kv))
            for rule in affine(blk, f"attn_{name}_norm", f"{attn}{name}_ln", size, bias=bias)
        ]
        out += [
            *affine(blk, "attn_norm", hf + "norm_1", n_embd, bias=bias),
            *fused_qkv(metadata, blk, attn + "Wqkv", sizes, n_embd, layout=PLAIN, bias=bias),
            *((norms if of_checkpoint else optional(norms)) if metadata.get(QK_NORM, True) else ()),
            *matrix(blk, "attn_output", attn + "out_proj", n_embd, n_embd, bias=bias),
            *affine(blk, "ffn_norm", hf + "norm_2", n_embd, bias=bias),
            *matrix(blk, "ffn_up", hf + "ffn.up_proj", n_ff, n_embd, bias=bias),
            TensorRule(blk + "ffn.act.scales", (n_ff,), (hf + "ffn.act.scales",), required=False),  # AWQ's
            *matrix(blk, "ffn_down", hf + "ffn.down_proj", n_embd, n_ff, bias=bias),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["MPTForCausalLM"],
        "model_type": "mpt",
        "d_model": sizes.n_embd,
        "n_layers": sizes.n_layer,
        "n_heads": sizes.n_head,
        "expansion_ratio": 4,
        "max_seq_len": sizes.n_ctx,
        "layer_norm_epsilon": 1e-3,
        "learned_pos_emb": True,
        "attn_config": {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8, "clip_qkv": 1.5},
        "no_bias": True,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


MAP = ArchMap(
    arch="mpt",
    model_types=("mpt",),
    architectures=("MPTForCausalLM", "MptForCausalLM"),
    metadata=metadata,
    rules=rules,
    example=example,
)
