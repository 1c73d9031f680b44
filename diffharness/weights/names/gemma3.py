"""`gemma3`: Gemma 3, text, alone or with images. Norm weights are kept as w - 1 in the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_int
from diffharness.weights.names._gemma import (
    dense_config,
    dense_metadata,
    dense_rules,
    gemma_example,
    layer_types,
    stored_float,
    text_part,
)
from diffharness.weights.names._keys import Keys
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._sliding import GLOBAL, SLIDING
from diffharness.weights.source import Metadata

PERIOD = 6  # the last layer of each period is global
N_LAYER_27B = 62
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "vocab_size": 262208,
}


def metadata(config: Config) -> dict[str, Any]:
    config = text_part(config, **DEFAULTS)
    if config.get("attn_logit_softcapping"):
        raise CheckpointError("config.json: expected Gemma 3 without `attn_logit_softcapping`, found one")
    sliding = (config.get("rope_parameters") or {}).get(SLIDING) or {}
    if sliding.get("rope_type", "default") != "default":
        raise CheckpointError(f"config.json: expected plain rope on sliding layers, found {sliding['rope_type']!r}")
    period = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or PERIOD)
    out = dense_metadata(
        config, "gemma3", period=period, n_layer_27b=N_LAYER_27B, default_theta=1e6, default_period=PERIOD
    )
    if SLIDING in layer_types(config, period):
        local = sliding.get("rope_theta") or config.get("rope_local_base_freq") or 10_000.0
        out["gemma3.attention.sliding_window"] = need_int(config, "sliding_window")
        out["gemma3.rope.freq_base_swa"] = float(local)
    if softcap := config.get("final_logit_softcapping"):
        out["gemma3.final_logit_softcapping"] = float(softcap)
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    out = dense_config(metadata, "gemma3", period=PERIOD, n_layer_27b=N_LAYER_27B)
    window = int(keys.get("attention.sliding_window", 0))
    if not window:
        out["layer_types"] = [GLOBAL] * keys.n_layer
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **out,
        "rope_local_base_freq": stored_float(keys.get("rope.freq_base_swa", 10_000.0)),
        "sliding_window": window or 4096,
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    return dense_rules(metadata, head_norms=True)


def example(sizes: Sizes) -> dict[str, Any]:
    """One period, and a layer of the next, so that both kinds are there."""
    return gemma_example(
        replace(sizes, n_layer=max(sizes.n_layer, PERIOD + 1)),
        "gemma3_text",
        "Gemma3ForCausalLM",
        query_pre_attn_scalar=sizes.head_dim,
        sliding_window=sizes.window,
        rope_local_base_freq=1e4,
        rope_theta=1e6,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    )


MAP = ArchMap(
    arch="gemma3",
    model_types=("gemma3_text", "gemma3"),
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    ignored=(
        "lm_head.",  # the embedding again, where a tied checkpoint has it
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)
