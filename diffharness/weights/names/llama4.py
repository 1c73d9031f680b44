"""`llama4`: Scout and Maverick, the text model of them.

The experts of a layer are one tensor of gates and ups side by side, and one of downs, each matrix transposed. Rows of Q
and K are in ggml's NORM order already. Chunk size and temperature have keys in GGUF that the engine's converter does
not write for this architecture, nor its graph read: they are written where they are not what the graph has in it.
Not supported: layers without rotation other than every fourth, layers with experts other than every so-manieth.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import attention_matrices, gated_matrices
from diffharness.weights.names._config import expect_activation, need_float, need_int
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    matrix,
    rope_freqs_rule,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._nested import with_nested_names
from diffharness.weights.names._pieces import half, transposed
from diffharness.weights.source import Metadata

_ARCH = "llama4"
_PERIOD = 4
_CHUNK = 8192
_TEMPERATURE = 0.1
HEAD_NORMS = "diffharness.attention.head_norms"  # bool: the chunked layers normalise heads
CHUNKED, GLOBAL = "chunked_attention", "full_attention"


def metadata(config: Config) -> dict[str, Any]:
    inner = config.get("text_config") or config
    inner = {key: value for key, value in inner.items() if value is not None}
    expect_activation(inner, "silu")
    n_layer, n_ff = need_int(inner, "num_hidden_layers"), need_int(inner, "intermediate_size")
    dense = inner.get("intermediate_size_mlp", n_ff)
    step = int(inner.get("interleave_moe_layer_step", 1))
    _expect("moe_layers", inner.get("moe_layers"), list(range(step - 1, n_layer, step)) if step else [])
    if inner.get("attention_bias"):
        raise CheckpointError("config.json: expected attention without biases, found `attention_bias` true")
    out = decoder_metadata(inner | {"intermediate_size": dense}, _ARCH, default_theta=500_000.0, head_dim=128)
    n_expert = int(inner.get("num_local_experts", 16))
    out |= {
        f"{_ARCH}.rope.dimension_count": Keys(out).head_dim,
        f"{_ARCH}.interleave_moe_layer_step": step,
        f"{_ARCH}.expert_count": n_expert,
        f"{_ARCH}.expert_used_count": int(inner.get("num_experts_per_tok", 1)),
        f"{_ARCH}.expert_feed_forward_length": n_ff,
        HEAD_NORMS: bool(inner.get("use_qk_norm", True)),
    }
    return out | _attention_metadata(inner, n_layer)


def _attention_metadata(config: Config, n_layer: int) -> dict[str, Any]:
    """What the layers see, and their temperature."""
    by_period = _turns(n_layer, need_int({"no_rope_layer_interval": _PERIOD, **config}, "no_rope_layer_interval"))
    turns = [bool(turn) for turn in config.get("no_rope_layers") or by_period]
    kinds = list(config.get("layer_types") or (CHUNKED if turn else GLOBAL for turn in turns))
    if set(kinds) == {GLOBAL}:
        _expect("no_rope_layers", turns, [True] * n_layer)
        return {f"{_ARCH}.attention.sliding_window": 0}
    _expect("no_rope_layers", turns, _turns(n_layer))
    out: dict[str, Any] = {}
    if kinds != [CHUNKED if turn else GLOBAL for turn in turns]:
        out[f"{_ARCH}.attention.sliding_window_pattern"] = [kind == CHUNKED for kind in kinds]
    chunk = need_int(config, "attention_chunk_size") if "attention_chunk_size" in config else _CHUNK
    if chunk != _CHUNK:
        out[f"{_ARCH}.attention.sliding_window"] = chunk
    scale = need_float(config, "attn_scale") if "attn_scale" in config else _TEMPERATURE
    if not config.get("attn_temperature_tuning", True):
        scale = 0.0
    if scale != _TEMPERATURE:
        out[f"{_ARCH}.attention.temperature_scale"] = scale
    if config.get("floor_scale", _CHUNK) != _CHUNK:
        out[f"{_ARCH}.attention.temperature_length"] = need_int(config, "floor_scale")
    return out


def _turns(n_layer: int, period: int = _PERIOD) -> list[bool]:
    """By layer, whether queries and keys turn: not in the last of each period."""
    return [(il + 1) % max(1, period) != 0 for il in range(n_layer)]


def _expect(key: str, found: object, expected: object) -> None:
    if found is not None and found != expected:
        raise CheckpointError(f"config.json: `{key}`: expected {expected}, found {found}: GGUF has no key for it")


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    turns = _turns(keys.n_layer)
    window = keys.get("attention.sliding_window", _CHUNK)
    slides = keys.get("attention.sliding_window_pattern")
    kinds = [CHUNKED if turn else GLOBAL for turn in turns]
    if isinstance(slides, (list, tuple)):
        kinds = [CHUNKED if slide else GLOBAL for slide in slides]
    if window == 0:
        turns, kinds = [True] * keys.n_layer, [GLOBAL] * keys.n_layer
    scale = keys.get("attention.temperature_scale", _TEMPERATURE) if window else 0.0
    return decoder_config(metadata, _ARCH) | {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "hidden_act": "silu",
        "intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size_mlp": keys["feed_forward_length"],
        "interleave_moe_layer_step": keys["interleave_moe_layer_step"],
        "num_local_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "use_qk_norm": bool(metadata.get(HEAD_NORMS, keys.n_expert != 128)),
        "no_rope_layers": [int(turn) for turn in turns],
        "layer_types": kinds,
        "attention_chunk_size": window or _CHUNK,
        "attn_temperature_tuning": bool(scale),
        "attn_scale": float(scale or _TEMPERATURE),
        "floor_scale": keys.get("attention.temperature_length", 0) or _CHUNK,
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, size = keys.n_embd, keys.head_dim
    step = keys.integer("interleave_moe_layer_step")
    out = [*embedding_rules(metadata), rope_freqs_rule(metadata, keys.integer("rope.dimension_count", size))]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *attention_matrices(keys, blk, hf + "self_attn."),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
        ]
        sparse = step > 0 and (il + 1) % step == 0
        if sparse:
            out += _expert_rules(keys, il)
        else:
            out += gated_matrices(blk, hf + "feed_forward.", keys.integer("feed_forward_length"), n_embd)
    return with_nested_names(out)


def _expert_rules(keys: Keys, il: int) -> list[TensorRule]:
    blk, hf, n_embd = f"blk.{il}.", f"model.layers.{il}.feed_forward.", keys.n_embd
    n_expert, n_ff = keys.n_expert, keys.integer("expert_feed_forward_length")
    wide, down, pair = (n_expert, n_ff, n_embd), (n_expert, n_embd, n_ff), (hf + "experts.gate_up_proj",)
    return [
        *matrix(blk, "ffn_gate_inp", hf + "router", n_expert, n_embd),
        TensorRule(blk + "ffn_gate_exps.weight", wide, pair, layout=half(wide, 0, turns=False)),
        TensorRule(blk + "ffn_up_exps.weight", wide, pair, layout=half(wide, 1, turns=False)),
        TensorRule(blk + "ffn_down_exps.weight", down, (hf + "experts.down_proj",), layout=transposed(down)),
        *gated_matrices(blk, hf + "shared_expert.", n_ff, n_embd, suffix="_shexp"),
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "llama4_text",
        "Llama4ForCausalLM",
        intermediate_size=sizes.n_ff_expert,
        intermediate_size_mlp=sizes.n_ff,
        rope_theta=None,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e3,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 64,
        },
        interleave_moe_layer_step=2,
        num_local_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        use_qk_norm=True,
        no_rope_layers=[int(turn) for turn in _turns(sizes.n_layer)],
        attention_chunk_size=_CHUNK,
        attn_temperature_tuning=True,
        attn_scale=_TEMPERATURE,
        floor_scale=_CHUNK,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("llama4_text", "llama4"),
    architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    ignored=("vision_model.", "multi_modal_projector."),
)
