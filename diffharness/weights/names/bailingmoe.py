"""`bailingmoe`: Ling lite and plus, as their published code has them.

The checkpoint keeps queries, keys and values in one matrix; GGUF keeps them apart, rows of Q and K permuted to
interleaved rotary pairs. A head that the model normalises at each use (`norm_head`, each column of its matrix by the
column's length) is normalised once and for all in the GGUF.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import expect_activation, need
from diffharness.weights.names._fused_qkv import fused_qkv_parts
from diffharness.weights.names._keys import (
    TIED_HEAD,
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    matrix,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Mapped, Sizes, TensorRule
from diffharness.weights.names._shared_experts import experts_config, experts_metadata, feed_forward_rules
from diffharness.weights.source import Float32Array, Metadata

_ARCH = "bailingmoe"
_NORM_HEAD = "diffharness.norm_head"  # bool: the checkpoint's head is normalised when it is used


def metadata(config: Config) -> dict[str, Any]:
    expect_bailing(config)
    if config.get("first_k_dense_replace"):
        raise CheckpointError("config.json: expected experts in every layer, found dense ones (first_k_dense_replace)")
    out = decoder_metadata(config, _ARCH) | experts_metadata(config, _ARCH)
    return out | {
        f"{_ARCH}.rope.dimension_count": Keys(out).head_dim,
        f"{_ARCH}.expert_weights_scale": 1.0,  # the model's code reads none
        f"{_ARCH}.expert_weights_norm": bool(need(config, "norm_topk_prob")),
        _NORM_HEAD: bool(config.get("norm_head", False)),
    }


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["BailingMoeForCausalLM"], "model_type": "bailing_moe"}
    out = named | bailing_config(metadata, _ARCH)
    for name in ("n_group", "topk_group", "routed_scaling_factor"):
        del out[name]
    return out | {"first_k_dense_replace": 0, "norm_head": bool(metadata.get(_NORM_HEAD, False))}


def bailing_config(metadata: Metadata, arch: str) -> dict[str, Any]:
    """config.json's keys of a decoder with experts, as Bailing names them."""
    out = decoder_config(metadata, arch) | experts_config(Keys(metadata))
    out |= {"num_experts": out.pop("n_routed_experts"), "num_shared_experts": out.pop("n_shared_experts")}
    return out | {"hidden_act": "silu", "use_bias": False, "use_qkv_bias": False}


def expect_bailing(config: Config) -> None:
    """CheckpointError for a config.json of a Bailing model that GGUF has no form of."""
    expect_activation(config, "silu")
    for key in ("use_bias", "use_qkv_bias"):
        if config.get(key):
            raise CheckpointError(f"config.json: `{key}`: expected false, found {config[key]!r}")


def ends(metadata: Metadata) -> list[TensorRule]:
    """Embedding, last norm and head; the embedding under Bailing's name."""
    embedding, *rest = embedding_rules(metadata)
    return [replace(embedding, hf=("model.word_embeddings.weight",)), *rest]


def rules(metadata: Metadata) -> list[TensorRule]:
    keys, out = Keys(metadata), ends(metadata)
    if metadata.get(_NORM_HEAD) and not metadata.get(TIED_HEAD):
        out[-1] = replace(out[-1], layout=Mapped(_by_column_length, lambda head: head))
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *fused_qkv_parts(keys, blk, hf + "attention.query_key_value"),
            *matrix(blk, "attn_output", hf + "attention.dense", keys.n_embd, keys.n_head * keys.head_dim),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
            *feed_forward_rules(_all_sparse(metadata), il, hf + "mlp."),
        ]
    return out


def _all_sparse(metadata: Metadata) -> Keys:
    """The keys without the number of leading dense layers: there are none, whatever it says."""
    return Keys({**metadata, f"{_ARCH}.leading_dense_block_count": 0})


def _by_column_length(head: Float32Array) -> Float32Array:
    lengths = np.sqrt(np.square(head, dtype=np.float32).sum(axis=0, keepdims=True)) + np.float32(1e-7)
    divided: Float32Array = head / lengths
    return divided


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "bailing_moe",
        "BailingMoeForCausalLM",
        first_k_dense_replace=0,
        num_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        moe_intermediate_size=sizes.n_ff_expert,
        num_shared_experts=2,
        norm_topk_prob=True,
        norm_head=False,
        use_bias=False,
        use_qkv_bias=False,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("bailing_moe",),
    architectures=("BailingMoeForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    transformers=False,
    otherwise="put together of its parts",
)
