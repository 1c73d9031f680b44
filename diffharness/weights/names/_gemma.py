"""What the maps of Gemma 2, 3 and 4 share: a checkpoint's prefixes, kinds of layers, and what the classes default to.

Keys that the engine's converter does not write are said only where they differ from what a reader of the format
assumes: `sliding_window_pattern` (a period that ends with a global layer: 2 in Gemma 2, 6 in Gemma 3) and
`attention.scale` (1/√head size; in the 27B models, told by their number of layers, 1/√(width / heads)). The engine
reads the first and not the second.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import expect_activation, need_float
from diffharness.weights.names._draw import by_width
from diffharness.weights.names._keys import (
    TIED_HEAD,
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    head_rules,
)
from diffharness.weights.names._map import ADD_ONE, PLAIN, Config, Draw, Layout, Sizes, TensorRule
from diffharness.weights.names._sliding import GLOBAL, SLIDING, by_period
from diffharness.weights.source import Metadata

# A text model's tensors are under the first prefix; inside an image-and-text model, under one of the others.
PREFIXES = ("model.", "model.language_model.", "language_model.model.")

# What the classes assume where a config.json leaves a key out, as those of image-and-text models do.
DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
}


def gemma_example(sizes: Sizes, model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    """config.json of a synthetic model: as every decoder's, with Gemma's activation and a tied head."""
    gemma = {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
    return decoder_example(sizes, model_type, architecture, **(gemma | more))


def hf_rule(
    name: str,
    shape: tuple[int, ...],
    hf: str,
    *,
    layout: Layout = PLAIN,
    required: bool = True,
    draw: Draw | None = None,
    synthetic: bool | None = None,
) -> TensorRule:
    """The rule of one tensor whose Hugging Face name may stand under any of `PREFIXES`."""
    first, *others = ((prefix + hf,) for prefix in PREFIXES)
    aliases = tuple((spelling, layout) for spelling in others)
    return TensorRule(name, shape, first, layout, required, aliases, draw=draw, synthetic=synthetic)


def text_part(config: Config, **defaults: Any) -> dict[str, Any]:
    """The text model's part of a config.json, completed with `DEFAULTS` and `defaults` where it leaves keys out.

    Raises CheckpointError for what no text form of Gemma has: biases, another activation, two-way attention.
    """
    inner = config.get("text_config") or config
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    stated = {key: value for key, value in inner.items() if value is not None}
    out = {**DEFAULTS, **defaults, **tied, **stated}
    expect_activation(out, "gelu_pytorch_tanh")
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar"):
        if need_float(out, key) <= 0:
            raise CheckpointError(f"config.json: `{key}`: expected a positive number, found {out[key]!r}")
    if out.get("attention_bias"):
        raise CheckpointError("config.json: expected attention without biases, found `attention_bias` true")
    if out.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise CheckpointError("config.json: expected causal attention on text, found `use_bidirectional_attention`")
    return out


def layer_types(config: Config, period: int) -> list[str]:
    """Each layer's kind in config.json's words: listed there, or following from a period that ends with a global."""
    n_layer = int(config["num_hidden_layers"])
    given = config.get("layer_types")
    kinds = list(given) if given else by_period(n_layer, period)
    if len(kinds) != n_layer or not set(kinds) <= {SLIDING, GLOBAL}:
        raise CheckpointError(
            f"config.json: `layer_types`: expected {n_layer} times {SLIDING} or {GLOBAL}, found {len(kinds)} values"
        )
    return kinds


def sliding_layers(keys: Keys, period: int) -> list[bool]:
    """Which layers slide, by the metadata's pattern: a truth value per layer, or the length of a period."""
    pattern = keys.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        return [pattern == 0 or il % pattern < pattern - 1 for il in range(keys.n_layer)]
    return [bool(slides) for slides in keys.by_layer("attention.sliding_window_pattern")]


def stored_float(value: Any) -> float:
    """The shortest decimal that reads back as the same float32: GGUF keeps 1e-6 as 9.99999997e-07."""
    return float(str(np.float32(value)))


# -- Gemma 2 and 3 ----------------------------------------------------------------------------------------


def dense_metadata(
    config: Config, arch: str, *, period: int, n_layer_27b: int, default_theta: float, default_period: int
) -> dict[str, Any]:
    """The keys that Gemma 2 and 3 write alike, of a completed config."""
    out = decoder_metadata(config, arch, default_theta=default_theta)
    kinds = layer_types(config, period)
    if kinds != layer_types({"num_hidden_layers": len(kinds)}, default_period):
        out[f"{arch}.attention.sliding_window_pattern"] = [kind == SLIDING for kind in kinds]
    scale = need_float(config, "query_pre_attn_scalar") ** -0.5
    if abs(scale - assumed_scale(Keys(out), n_layer_27b)) > 1e-6 * scale:
        out[f"{arch}.attention.scale"] = scale
    return out


def assumed_scale(keys: Keys, n_layer_27b: int) -> float:
    """The scale of attention scores where no key says it."""
    width = keys.n_embd // keys.n_head if keys.n_layer == n_layer_27b else keys.head_dim
    return float(width**-0.5)


def dense_config(metadata: Metadata, arch: str, *, period: int, n_layer_27b: int) -> dict[str, Any]:
    """The keys of config.json that Gemma 2 and 3 share."""
    keys = Keys(metadata)
    scale = float(keys.get("attention.scale", assumed_scale(keys, n_layer_27b)))
    return {
        **decoder_config(metadata, arch),
        "attn_logit_softcapping": cap(keys, "attn_logit_softcapping", 0.0),
        "final_logit_softcapping": cap(keys, "final_logit_softcapping", 0.0),
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [SLIDING if slides else GLOBAL for slides in sliding_layers(keys, period)],
        "query_pre_attn_scalar": round(scale**-2),
        "rms_norm_eps": stored_float(keys["attention.layer_norm_rms_epsilon"]),
        "tie_word_embeddings": bool(metadata.get(TIED_HEAD, True)),
    }


def cap(keys: Keys, name: str, default: float) -> float | None:
    """config.json's value of a cap, whose absence GGUF says with 0 (or, by `default`, with no key)."""
    return stored_float(keys.get(name, default)) or None


def dense_rules(metadata: Metadata, *, head_norms: bool) -> list[TensorRule]:
    """Every tensor of a Gemma 2 (no `head_norms`) or 3; the checkpoint keeps norm weights as w - 1."""
    keys = Keys(metadata)
    d, n_ff, head = keys.n_embd, int(keys["feed_forward_length"]), keys.head_dim
    q, kv = keys.n_head * head, keys.n_head_kv * head

    def norm(name: str, hf: str, size: int) -> TensorRule:
        return hf_rule(name + ".weight", (size,), hf + ".weight", layout=ADD_ONE)

    rules = [
        # The forward multiplies the embedding by the root of its width.
        hf_rule("token_embd.weight", (keys.n_vocab, d), "embed_tokens.weight", draw=by_width(1.0)),
        norm("output_norm", "norm", d),
        *head_rules(metadata),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"layers.{il}."
        rules += [
            norm(blk + "attn_norm", hf + "input_layernorm", d),
            hf_rule(blk + "attn_q.weight", (q, d), hf + "self_attn.q_proj.weight"),
            hf_rule(blk + "attn_k.weight", (kv, d), hf + "self_attn.k_proj.weight"),
            hf_rule(blk + "attn_v.weight", (kv, d), hf + "self_attn.v_proj.weight"),
            hf_rule(blk + "attn_output.weight", (d, q), hf + "self_attn.o_proj.weight"),
            *(  # no released model has them; the engine reads them where a file does
                TensorRule(f"{blk}attn_{x}.bias", (n,), (f"model.{hf}self_attn.{x}_proj.bias",), required=False)
                for x, n in (("q", q), ("k", kv), ("v", kv))
            ),
            norm(blk + "post_attention_norm", hf + "post_attention_layernorm", d),
            norm(blk + "ffn_norm", hf + "pre_feedforward_layernorm", d),
            hf_rule(blk + "ffn_gate.weight", (n_ff, d), hf + "mlp.gate_proj.weight"),
            hf_rule(blk + "ffn_up.weight", (n_ff, d), hf + "mlp.up_proj.weight"),
            hf_rule(blk + "ffn_down.weight", (d, n_ff), hf + "mlp.down_proj.weight"),
            norm(blk + "post_ffw_norm", hf + "post_feedforward_layernorm", d),
        ]
        if head_norms:
            rules += [norm(f"{blk}attn_{x}_norm", f"{hf}self_attn.{x}_norm", head) for x in "qk"]
    return rules
