"""`exaone4`: EXAONE 4.0 and 4.5, text, alone or inside the image-and-text model.

Norms of heads and after each branch, none before them. Layers that predict further tokens are kept as further blocks;
their checkpoints keep them under `mtp.`, what all of them share once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from diffharness.weights.names._blocks import attention_matrices, gated_matrices
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    rope_freqs_rule,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._nested import with_nested_names
from diffharness.weights.names._shared_experts import n_main_layers, nextn_metadata, nextn_rules
from diffharness.weights.names._sliding import GLOBAL, SLIDING
from diffharness.weights.source import Metadata

_ARCH = "exaone4"
_WINDOW, _PERIOD = 4096, 4  # where config.json leaves them out; of so many layers all but the last slide
_NEXTN_NAMES = {
    "eh_proj": "mtp.fc",
    "enorm": "mtp.pre_fc_norm_embedding",
    "hnorm": "mtp.pre_fc_norm_hidden",
    "shared_head_norm": "mtp.norm",
}


def metadata(config: Config) -> dict[str, Any]:
    config = config.get("text_config") or config
    expect_activation(config, "silu")
    return decoder_metadata(config, _ARCH) | window_metadata(config, _ARCH) | nextn_metadata(config, _ARCH)


def window_metadata(config: Config, arch: str) -> dict[str, Any]:
    """The keys of the window and of which layers slide; none where config.json says that there is no window."""
    config = {"sliding_window": _WINDOW, **config}
    if not config["sliding_window"]:
        return {}
    return {
        f"{arch}.attention.sliding_window": need_int(config, "sliding_window"),
        f"{arch}.attention.sliding_window_pattern": _slides(config),
    }


def _slides(config: Config) -> list[bool]:
    """Which layers slide: by `layer_types`, or a period as a number or as letters (`LLLG`)."""
    n_layer, types = need_int(config, "num_hidden_layers"), config.get("layer_types")
    if types:
        return [kind == SLIDING for kind in types][:n_layer]
    pattern = config.get("sliding_window_pattern") or _PERIOD
    if isinstance(pattern, str):
        return [pattern[il % len(pattern)] == "L" for il in range(n_layer)]
    return [(il + 1) % pattern != 0 for il in range(n_layer)]


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["Exaone4ForCausalLM"], "model_type": "exaone4", "hidden_act": "silu"}
    return named | decoder_config(metadata, _ARCH) | window_config(Keys(metadata))


def window_config(keys: Keys) -> dict[str, Any]:
    """config.json's keys of layers and their kinds."""
    window, n_layer = keys.get("attention.sliding_window", 0), n_main_layers(keys)
    pattern = keys.get("attention.sliding_window_pattern", _PERIOD)
    if not window:
        slides = [False] * n_layer
    elif isinstance(pattern, int) and not isinstance(pattern, bool):
        slides = [pattern == 0 or il % pattern < pattern - 1 for il in range(n_layer)]
    else:
        slides = [bool(slide) for slide in pattern][:n_layer]
    out = {
        "num_hidden_layers": n_layer,
        "sliding_window": window or None,
        "layer_types": [SLIDING if slide else GLOBAL for slide in slides],
    }
    n_nextn = keys.n_layer - n_layer
    return out | ({"num_nextn_predict_layers": n_nextn} if n_nextn else {})


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    out = [*embedding_rules(metadata), rope_freqs_rule(metadata, keys.integer("rope.dimension_count", keys.head_dim))]
    for il in range(n_main_layers(keys)):
        out += _layer(keys, il, f"model.layers.{il}.")
    for il in range(n_main_layers(keys), keys.n_layer):
        out += further_rules(keys, il, _layer(keys, il, f"mtp.layers.{il - n_main_layers(keys)}."))
    return with_nested_names(out)


def _layer(keys: Keys, il: int, hf: str) -> list[TensorRule]:
    blk = f"blk.{il}."
    return [
        *attention_matrices(keys, blk, hf + "self_attn."),
        vector(blk, "attn_q_norm", hf + "self_attn.q_norm", keys.head_dim),
        vector(blk, "attn_k_norm", hf + "self_attn.k_norm", keys.head_dim),
        vector(blk, "post_attention_norm", hf + "post_attention_layernorm", keys.n_embd),
        *gated_matrices(blk, hf + "mlp.", keys.integer("feed_forward_length"), keys.n_embd),
        vector(blk, "post_ffw_norm", hf + "post_feedforward_layernorm", keys.n_embd),
    ]


def further_rules(keys: Keys, il: int, layer: Iterable[TensorRule]) -> list[TensorRule]:
    """A layer that predicts further tokens, none of it required, under the names of EXAONE's checkpoints."""
    out = []
    for rule in nextn_rules(keys, il, layer, "mtp."):
        shared = _NEXTN_NAMES.get(rule.name.split(".")[-2])
        out.append(replace(rule, hf=(shared + ".weight",)) if shared else rule)
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    """As the 1.2B, without a window: the engine has the larger models' only in one of 64 layers."""
    scaling = {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    types = [GLOBAL] * sizes.n_layer
    own: dict[str, Any] = {"head_dim": None, "rope_scaling": scaling, "layer_types": types}
    return decoder_example(sizes, "exaone4", "Exaone4ForCausalLM", **own) | {"sliding_window": None}


MAP = ArchMap(
    arch=_ARCH,
    model_types=("exaone4", "exaone4_5", "exaone4_5_text"),
    architectures=("Exaone4ForCausalLM", "Exaone4_5_ForConditionalGeneration"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    ignored=("model.visual.", "visual."),
)
