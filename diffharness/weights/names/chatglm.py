"""`chatglm`: ChatGLM 2 and 3, GLM-4-9B, as first published (`chatglm`) and as transformers has it (`glm`).

The first keeps queries, keys and values in one matrix, as does the GGUF made of it; the second keeps them apart. The
base of the rotary embedding is 10000 times `rope_ratio` in the first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import ATTENTION_BIAS, attention_matrices
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._glm import fused_mlp, glm_config, glm_metadata
from diffharness.weights.names._keys import Keys, decoder_example, embedding_rules, matrix, vector
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "chatglm"
_FUSED = "diffharness.fused_qkv"  # bool: queries, keys and values are one matrix; absent where nobody says


class _Names(NamedTuple):
    """How one of the two publications spells its tensors."""

    ends: tuple[str, str, str]  # embedding, last norm, head
    layers: str
    dense: str  # the attention's output
    up: str
    down: str


_FIRST = _Names(
    ("transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm", "transformer.output_layer"),
    "transformer.encoder.layers.",
    "self_attention.dense",
    "dense_h_to_4h",
    "dense_4h_to_h",
)
_LATER = _Names(
    ("model.embed_tokens", "model.norm", "lm_head"), "model.layers.", "self_attn.o_proj", "gate_up_proj", "down_proj"
)

# What a `chatglm` config.json may say, and must not say otherwise.
_WANTED: dict[str, tuple[object, ...]] = {
    "rmsnorm": (True, None),
    "add_bias_linear": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "post_layer_norm": (True, None),
}


def metadata(config: Config) -> dict[str, Any]:
    remote = config.get("model_type") == "chatglm"
    out = glm_metadata(_in_glm_words(config) if remote else config, _ARCH, bias=True)
    keys = Keys(out)
    if keys.n_head * keys.head_dim != keys.n_embd:
        raise CheckpointError(
            f"config.json: expected heads as wide as the model ({keys.n_embd}), found {keys.n_head} of {keys.head_dim}"
        )
    for name in ("key_length", "value_length"):  # the converter leaves them out: they follow from the heads
        out.pop(f"{_ARCH}.attention.{name}", None)
    return out | {_FUSED: remote}


def config(metadata: Metadata) -> dict[str, Any]:
    out = glm_config(metadata, _ARCH)
    if not metadata.get(_FUSED):
        return {"architectures": ["GlmForCausalLM"], "model_type": "glm"} | out
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "num_layers": out["num_hidden_layers"],
        "num_attention_heads": out["num_attention_heads"],
        "multi_query_attention": out["num_key_value_heads"] != out["num_attention_heads"],
        "multi_query_group_num": out["num_key_value_heads"],
        "hidden_size": out["hidden_size"],
        "ffn_hidden_size": out["intermediate_size"],
        "kv_channels": out["head_dim"],
        "seq_length": out["max_position_embeddings"],
        "layernorm_epsilon": out["rms_norm_eps"],
        "rope_ratio": out["rope_theta"] / 10000.0,
        "padded_vocab_size": out["vocab_size"],
        "tie_word_embeddings": out["tie_word_embeddings"],
        "add_qkv_bias": out["attention_bias"],
        **{key: values[0] for key, values in _WANTED.items()},
    }


def _in_glm_words(config: Config) -> dict[str, Any]:
    """A `chatglm` config.json in transformers' words."""
    for key, values in _WANTED.items():
        if config.get(key) not in values:
            raise CheckpointError(f"config.json: `{key}`: expected {values[0]}, found {config[key]!r}")
    n_head = need_int(config, "num_attention_heads")
    grouped = config.get("multi_query_attention")
    ratio = need_float(config, "rope_ratio") if config.get("rope_ratio") is not None else 1.0
    return {
        "num_hidden_layers": need_int(config, "num_layers", "num_hidden_layers"),
        "num_attention_heads": n_head,
        "num_key_value_heads": need_int(config, "multi_query_group_num") if grouped else n_head,
        "hidden_size": need_int(config, "hidden_size"),
        "intermediate_size": need_int(config, "ffn_hidden_size"),
        "head_dim": config.get("kv_channels"),
        "max_position_embeddings": need_int(config, "seq_length"),
        "rms_norm_eps": need_float(config, "layernorm_epsilon"),
        "rope_theta": 10000.0 * ratio,
        "vocab_size": need_int(config, "padded_vocab_size", "vocab_size"),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "attention_bias": bool(config.get("add_qkv_bias", False)),
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys, fused = Keys(metadata), metadata.get(_FUSED)
    names = _FIRST if fused else _LATER
    ends = zip(embedding_rules(metadata), names.ends, strict=False)  # a tied model has no head
    out = [replace(rule, hf=(name + ".weight",)) for rule, name in ends]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"{names.layers}{il}."
        *apart, dense = attention_matrices(keys, blk, hf + "self_attn.", bias=metadata.get(ATTENTION_BIAS))
        joined = _joined(metadata, keys, blk, hf + "self_attention.query_key_value")
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *(replace(rule, required=fused is False and rule.required) for rule in apart if not fused),
            *(replace(rule, required=fused is True and rule.required) for rule in joined if fused is not False),
            replace(dense, hf=(f"{hf}{names.dense}.weight",)),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
            *fused_mlp(keys, blk, f"{hf}mlp.{names.up}", f"{hf}mlp.{names.down}"),
        ]
    return out


def _joined(metadata: Metadata, keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    rows = (keys.n_head + 2 * keys.n_head_kv) * keys.head_dim
    return matrix(blk, "attn_qkv", hf, rows, keys.n_embd, bias=metadata.get(ATTENTION_BIAS))


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "glm",
        "GlmForCausalLM",
        head_dim=sizes.n_embd // sizes.n_head,
        attention_bias=True,
        partial_rotary_factor=0.5,
        pad_token_id=0,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("glm", "chatglm"),
    architectures=("GlmForCausalLM", "ChatGLMModel", "ChatGLMForConditionalGeneration"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    ignored=("transformer.rotary_pos_emb.",),
)
