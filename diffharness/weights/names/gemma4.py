"""`gemma4`: Gemma 4, every text form. Dense with K=V globals, routed experts, per-layer embeddings with shared KV.

What GGUF does not keep as a key, and how it is recovered:
- K=V on global layers: the file has no `attn_v` there. By our writing (and the engine's converter, for every
  published model) `head_count_kv` is an array exactly when keys and values are one projection.
- The share of a global head that turns lives only in the tensor `rope_freqs`: divisors of the rope frequencies, 1 for
  the pairs that turn and 1e30 for those that stand still. A share other than the published 0.25 has a key of our own.

The experts' gate and up projections are one tensor in a checkpoint and in the converter's files; files that hold them
apart are known too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_int
from diffharness.weights.names._draw import around, by_width, normal
from diffharness.weights.names._gemma import (
    cap,
    gemma_example,
    hf_rule,
    layer_types,
    stored_float,
    text_part,
)
from diffharness.weights.names._keys import TIED_HEAD, Keys, decoder_metadata, head_rules
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._sliding import GLOBAL, SLIDING
from diffharness.weights.source import Float32Array, Metadata

PERIOD = 6  # the last layer of each period is global
ROTARY_SHARE = "diffharness.rope.global_rotary_share"  # ours: see above
STILL = 1e30  # divisor of a frequency that is not to turn
ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "vocab_size": 262144,
}
UNIFIED: dict[str, Any] = {"max_position_embeddings": 262144, "sliding_window": 1024}  # in which that class differs


def metadata(config: Config) -> dict[str, Any]:
    inner = config.get("text_config") or config
    unified = str(inner.get("model_type")).startswith("gemma4_unified")
    ple = inner.get("hidden_size_per_layer_input", 0 if unified else 256) or 0
    config = text_part(config, **(DEFAULTS | (UNIFIED if unified else {})))
    kinds = [*layer_types(config, PERIOD)[:-1], GLOBAL]  # the last layer is global whatever is listed
    full, sliding = _ropes(config)
    k_eq_v = bool(config.get("attention_k_eq_v"))
    head, head_kv = need_int(config, "head_dim"), need_int(config, "num_key_value_heads")
    global_head = _of_globals(config, kinds, "head_dim", config.get("global_head_dim", 512))
    # The older, flat key of the number of heads counts only where keys and values are one.
    flat_kv = config.get("num_global_key_value_heads", head_kv) if k_eq_v else head_kv
    global_kv = _of_globals(config, kinds, "num_key_value_heads", flat_kv)
    n_ff, n_shared = need_int(config, "intermediate_size"), int(config.get("num_kv_shared_layers", 0))
    first_shared = len(kinds) - n_shared
    out = decoder_metadata({**config, "rope_parameters": {**full, "rope_type": "default"}}, "gemma4") | {
        "gemma4.attention.key_length": global_head,
        "gemma4.attention.value_length": global_head,
        "gemma4.attention.key_length_swa": head,
        "gemma4.attention.value_length_swa": head,
        "gemma4.attention.sliding_window": need_int(config, "sliding_window"),
        "gemma4.attention.sliding_window_pattern": [kind == SLIDING for kind in kinds],
        "gemma4.attention.shared_kv_layers": n_shared,
        "gemma4.embedding_length_per_layer_input": int(ple),
        "gemma4.rope.freq_base_swa": float(sliding["rope_theta"]),
        "gemma4.rope.dimension_count": global_head,
        "gemma4.rope.dimension_count_swa": head,
        # Said even where there is none: the format's default is 30.
        "gemma4.final_logit_softcapping": float(config.get("final_logit_softcapping") or 0.0),
    }
    if k_eq_v or global_kv != head_kv:
        out["gemma4.attention.head_count_kv"] = [head_kv if kind == SLIDING else global_kv for kind in kinds]
    if config.get("use_double_wide_mlp"):
        out["gemma4.feed_forward_length"] = [n_ff * (1 + (il >= first_shared)) for il in range(len(kinds))]
    if (share := float(full.get("partial_rotary_factor", 1.0))) != ROPE[GLOBAL]["partial_rotary_factor"]:
        out[ROTARY_SHARE] = share
    if config.get("enable_moe_block"):
        out["gemma4.expert_count"] = need_int(config, "num_experts")
        out["gemma4.expert_used_count"] = need_int(config, "top_k_experts")
        out["gemma4.expert_feed_forward_length"] = need_int(config, "moe_intermediate_size")
    return out


def _ropes(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rope parameters of global and of sliding layers."""
    given = config.get("rope_parameters") or ROPE
    full, sliding = given.get(GLOBAL) or ROPE[GLOBAL], given.get(SLIDING) or ROPE[SLIDING]
    kinds = full.get("rope_type"), sliding.get("rope_type", "default")
    if kinds != ("proportional", "default") or full.get("factor", 1.0) != 1.0:
        raise CheckpointError(
            "config.json: expected proportional rope without a factor on global layers and plain rope on sliding "
            f"ones, found {dict(full)} and {dict(sliding)}"
        )
    return dict(full), dict(sliding)


def _of_globals(config: Config, kinds: list[str], key: str, flat: int) -> int:
    """A hyperparameter of the global layers: from `per_layer_config`, else the older flat key's value."""
    overrides = config.get("per_layer_config")
    if overrides is None:
        return int(flat)
    by_layer = {int(il): values for il, values in overrides.items()}  # spelt "5", or "05" where there are over ten
    found = {int(by_layer.get(il, {}).get(key, config[key])) for il, kind in enumerate(kinds) if kind == GLOBAL}
    if len(found) != 1:
        raise CheckpointError(f"config.json: expected one `{key}` for all global layers, found {sorted(found)}")
    return found.pop()


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    slides = [bool(slide) for slide in keys.by_layer("attention.sliding_window_pattern")]
    heads_kv, n_ff = keys.by_layer("attention.head_count_kv"), keys.by_layer("feed_forward_length")
    k_eq_v = isinstance(keys["attention.head_count_kv"], list | tuple)
    n_expert = int(keys.get("expert_count", 0))
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "attention_bias": False,
        "attention_k_eq_v": k_eq_v,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "dtype": "float32",
        "enable_moe_block": n_expert > 0,
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "final_logit_softcapping": cap(keys, "final_logit_softcapping", 30.0),
        "global_head_dim": keys.head_dim,
        "head_dim": int(keys.get("attention.key_length_swa", keys.head_dim)),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": keys.n_embd,
        "hidden_size_per_layer_input": int(keys.get("embedding_length_per_layer_input", 0)),
        "intermediate_size": n_ff[0],
        "layer_types": [SLIDING if slide else GLOBAL for slide in slides],
        "max_position_embeddings": keys["context_length"],
        "moe_intermediate_size": keys["expert_feed_forward_length"] if n_expert else None,
        "num_attention_heads": keys.n_head,
        "num_experts": n_expert or None,
        "num_global_key_value_heads": heads_kv[slides.index(False)] if k_eq_v and False in slides else None,
        "num_hidden_layers": keys.n_layer,
        "num_key_value_heads": heads_kv[slides.index(True)] if True in slides else heads_kv[0],
        "num_kv_shared_layers": int(keys.get("attention.shared_kv_layers", 0)),
        "rms_norm_eps": stored_float(keys["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {
            GLOBAL: {
                "partial_rotary_factor": float(metadata.get(ROTARY_SHARE, ROPE[GLOBAL]["partial_rotary_factor"])),
                "rope_theta": stored_float(keys["rope.freq_base"]),
                "rope_type": "proportional",
            },
            SLIDING: {
                "rope_theta": stored_float(keys.get("rope.freq_base_swa", ROPE[SLIDING]["rope_theta"])),
                "rope_type": "default",
            },
        },
        "sliding_window": keys["attention.sliding_window"],
        "tie_word_embeddings": bool(metadata.get(TIED_HEAD, True)),
        "top_k_experts": keys["expert_used_count"] if n_expert else None,
        "use_double_wide_mlp": len(set(n_ff)) > 1,
        "vocab_size": keys.n_vocab,
        "vocab_size_per_layer_input": keys.n_vocab,
    }


def rope_divisors(head_dim: int, share: float) -> Float32Array:
    """[head_dim / 2] divisors of a global head's rope frequencies: 1 for the first `share` of pairs, then 1e30."""
    turning = int(share * head_dim // 2)
    return np.where(np.arange(head_dim // 2) < turning, 1.0, STILL).astype(np.float32)


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    slides = [bool(slide) for slide in keys.by_layer("attention.sliding_window_pattern")]
    ple = int(keys.get("embedding_length_per_layer_input", 0))
    d, n_vocab, n_layer = keys.n_embd, keys.n_vocab, keys.n_layer
    out = [
        hf_rule("token_embd.weight", (n_vocab, d), "embed_tokens.weight", draw=by_width(1.0)),
        hf_rule("output_norm.weight", (d,), "norm.weight"),
        *head_rules(metadata),
    ]
    if not all(slides):
        size, share = keys.head_dim, float(metadata.get(ROTARY_SHARE, ROPE[GLOBAL]["partial_rotary_factor"]))
        out.append(TensorRule("rope_freqs.weight", (size // 2,), values=lambda: rope_divisors(size, share)))
    if ple:
        out += [
            hf_rule(
                "per_layer_token_embd.weight",
                (n_vocab, n_layer * ple),
                "embed_tokens_per_layer.weight",
                draw=normal(ple**-0.5),
            ),
            hf_rule("per_layer_model_proj.weight", (n_layer * ple, d), "per_layer_model_projection.weight"),
            hf_rule("per_layer_proj_norm.weight", (ple,), "per_layer_projection_norm.weight"),
        ]
    for il, slide in enumerate(slides[:n_layer]):
        blk, hf = f"blk.{il}.", f"layers.{il}."
        out += _attention_rules(keys, il, slide)
        out += _feed_forward_rules(keys, il)
        if ple:
            out += [
                hf_rule(blk + "inp_gate.weight", (ple, d), hf + "per_layer_input_gate.weight"),
                hf_rule(blk + "proj.weight", (d, ple), hf + "per_layer_projection.weight"),
                hf_rule(blk + "post_norm.weight", (d,), hf + "post_per_layer_input_norm.weight"),
            ]
        out.append(
            hf_rule(blk + "layer_output_scale.weight", (1,), hf + "layer_scalar", required=False, synthetic=True)
        )
    return out


def _attention_rules(keys: Keys, il: int, slide: bool) -> list[TensorRule]:
    blk, hf, d = f"blk.{il}.", f"layers.{il}.", keys.n_embd
    head = int(keys.get("attention.key_length_swa", keys.head_dim)) if slide else keys.head_dim
    q, kv = keys.n_head * head, int(keys.by_layer("attention.head_count_kv")[il]) * head
    # A layer that borrows keys and values needs none, though checkpoints may carry them, unused.
    scores = around(head**-0.25)  # the norms of queries and keys are the only scale that scores have
    own = il < keys.n_layer - int(keys.get("attention.shared_kv_layers", 0))
    return [
        hf_rule(blk + "attn_norm.weight", (d,), hf + "input_layernorm.weight"),
        hf_rule(blk + "attn_q.weight", (q, d), hf + "self_attn.q_proj.weight"),
        hf_rule(blk + "attn_q_norm.weight", (head,), hf + "self_attn.q_norm.weight", draw=scores),
        hf_rule(blk + "attn_k.weight", (kv, d), hf + "self_attn.k_proj.weight", required=own),
        hf_rule(blk + "attn_k_norm.weight", (head,), hf + "self_attn.k_norm.weight", required=own, draw=scores),
        hf_rule(blk + "attn_v.weight", (kv, d), hf + "self_attn.v_proj.weight", required=own and slide),
        hf_rule(blk + "attn_output.weight", (d, q), hf + "self_attn.o_proj.weight"),
        hf_rule(blk + "post_attention_norm.weight", (d,), hf + "post_attention_layernorm.weight"),
    ]


def _feed_forward_rules(keys: Keys, il: int) -> list[TensorRule]:
    """The dense MLP and, where there are experts, the router and the routed ones."""
    blk, hf, d = f"blk.{il}.", f"layers.{il}.", keys.n_embd
    n_ff, n_expert = int(keys.by_layer("feed_forward_length")[il]), int(keys.get("expert_count", 0))
    out = [
        hf_rule(blk + "ffn_norm.weight", (d,), hf + "pre_feedforward_layernorm.weight"),
        hf_rule(blk + "ffn_gate.weight", (n_ff, d), hf + "mlp.gate_proj.weight"),
        hf_rule(blk + "ffn_up.weight", (n_ff, d), hf + "mlp.up_proj.weight"),
        hf_rule(blk + "ffn_down.weight", (d, n_ff), hf + "mlp.down_proj.weight"),
        hf_rule(blk + "post_ffw_norm.weight", (d,), hf + "post_feedforward_layernorm.weight"),
    ]
    if not n_expert:
        return out
    n_ff = int(keys["expert_feed_forward_length"])
    stack, moe = (n_expert, 2 * n_ff, d), hf + "experts."
    return [
        *out,
        hf_rule(blk + "ffn_gate_inp.weight", (n_expert, d), hf + "router.proj.weight"),
        hf_rule(blk + "ffn_gate_inp.scale", (d,), hf + "router.scale"),
        hf_rule(blk + "ffn_gate_up_exps.weight", stack, moe + "gate_up_proj", required=False),
        TensorRule(blk + "ffn_gate_exps.weight", (n_expert, n_ff, d), required=False),
        TensorRule(blk + "ffn_up_exps.weight", (n_expert, n_ff, d), required=False),
        hf_rule(blk + "ffn_down_exps.weight", (n_expert, d, n_ff), moe + "down_proj"),
        hf_rule(blk + "ffn_down_exps.scale", (n_expert,), hf + "router.per_expert_scale", required=False),
        hf_rule(blk + "pre_ffw_norm_2.weight", (d,), hf + "pre_feedforward_layernorm_2.weight"),
        hf_rule(blk + "post_ffw_norm_1.weight", (d,), hf + "post_feedforward_layernorm_1.weight"),
        hf_rule(blk + "post_ffw_norm_2.weight", (d,), hf + "post_feedforward_layernorm_2.weight"),
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    """Two periods; globals whose heads are wider and whose keys are their values."""
    n_layer = max(sizes.n_layer, 6)
    return gemma_example(
        replace(sizes, n_layer=n_layer),
        "gemma4_text",
        "Gemma4ForCausalLM",
        rope_theta=None,
        sliding_window=sizes.window,
        layer_types=[GLOBAL if il % 3 == 2 else SLIDING for il in range(n_layer)],
        global_head_dim=2 * sizes.head_dim,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        final_logit_softcapping=4.0,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=sizes.n_vocab,
        tie_word_embeddings=True,
    )


MAP = ArchMap(
    arch="gemma4",
    model_types=("gemma4_text", "gemma4", "gemma4_unified_text", "gemma4_unified"),
    architectures=(
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForCausalLM",
        "Gemma4UnifiedForConditionalGeneration",
    ),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    ignored=(
        "lm_head.",  # the embedding again, where a tied checkpoint has it
        "model.vision_tower.",
        "model.audio_tower.",
        "model.embed_vision.",
        "model.embed_audio.",
        "model.vision_embedder.",
    ),
)
