"""`qwen`: Qwen 1, as the published code has it. GPT-2's words for Llama's tensors.

`intermediate_size`, and with it `feed_forward_length`, counts gate and up together: each has half of it.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    head_rules,
    matrix,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "qwen"
# config.json's own words for what others call otherwise
_WORDS = {"rms_norm_eps": "layer_norm_epsilon", "rope_theta": "rotary_emb_base"}


def metadata(config: Config) -> dict[str, Any]:
    for key, wanted in (("rotary_pct", 1.0), ("scale_attn_weights", True)):
        if config.get(key, wanted) != wanted:
            raise CheckpointError(f"config.json: `{key}`: expected {wanted}, found {config[key]!r}")
    length = config.get("max_position_embeddings") or config.get("seq_length")
    common = {**config, "max_position_embeddings": length}
    common |= {theirs: need(config, own, theirs) for theirs, own in _WORDS.items()}
    return decoder_metadata(common, _ARCH)


def config(metadata: Metadata) -> dict[str, Any]:
    out = decoder_config(metadata, _ARCH)
    out |= {own: out.pop(theirs) for theirs, own in _WORDS.items()}
    own = {"kv_channels": out.pop("head_dim"), "seq_length": out["max_position_embeddings"], "no_bias": True}
    return {"architectures": ["QWenLMHeadModel"], "model_type": "qwen"} | out | own


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, half = keys.n_embd, keys.integer("feed_forward_length") // 2
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("transformer.wte.weight",)),
        TensorRule("output_norm.weight", (n_embd,), ("transformer.ln_f.weight",)),
        *head_rules(metadata),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"transformer.h.{il}."
        out += [
            vector(blk, "attn_norm", hf + "ln_1", n_embd),
            *matrix(blk, "attn_qkv", hf + "attn.c_attn", 3 * n_embd, n_embd, bias=True),
            *matrix(blk, "attn_output", hf + "attn.c_proj", n_embd, n_embd),
            vector(blk, "ffn_norm", hf + "ln_2", n_embd),
            *matrix(blk, "ffn_up", hf + "mlp.w1", half, n_embd),
            *matrix(blk, "ffn_gate", hf + "mlp.w2", half, n_embd),
            *matrix(blk, "ffn_down", hf + "mlp.c_proj", n_embd, half),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    own: dict[str, Any] = {"intermediate_size": 2 * sizes.n_ff, "num_key_value_heads": None, "head_dim": None}
    out = decoder_example(sizes, "qwen", "QWenLMHeadModel", **own)
    return out | {own: out.pop(theirs) for theirs, own in _WORDS.items()}


MAP = ArchMap(
    arch=_ARCH,
    model_types=("qwen",),
    architectures=("QWenLMHeadModel",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    transformers=False,
)
