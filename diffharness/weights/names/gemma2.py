"""`gemma2`: Gemma 2. Norm weights are kept as w - 1 in the checkpoint; the head is always tied."""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_int, rope_parameters
from diffharness.weights.names._gemma import cap, dense_config, dense_metadata, dense_rules, gemma_example, text_part
from diffharness.weights.names._keys import TIED_HEAD, Keys
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

PERIOD = 2  # the last layer of each period is global
N_LAYER_27B = 46
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "vocab_size": 256000,
}


def metadata(config: Config) -> dict[str, Any]:
    out = dense_metadata(
        complete := text_part(config, **DEFAULTS),
        "gemma2",
        period=PERIOD,
        n_layer_27b=N_LAYER_27B,
        default_theta=1e4,
        default_period=PERIOD,
    )
    if not out[TIED_HEAD]:
        raise CheckpointError("config.json: expected a tied head, all that Gemma 2's GGUF form can hold")
    if (kind := rope_parameters(complete, default_theta=1e4)["rope_type"]) != "default":
        raise CheckpointError(f"config.json: expected plain rope in Gemma 2, found {kind!r}")
    return out | {
        "gemma2.attention.sliding_window": need_int(complete, "sliding_window"),
        # A config without a cap says null; the format's defaults are 50 and 30, so that 0 has to be said.
        "gemma2.attn_logit_softcapping": float(config.get("attn_logit_softcapping", 50.0) or 0.0),
        "gemma2.final_logit_softcapping": float(config.get("final_logit_softcapping", 30.0) or 0.0),
    }


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **dense_config(metadata, "gemma2", period=PERIOD, n_layer_27b=N_LAYER_27B),
        "attn_logit_softcapping": cap(keys, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": cap(keys, "final_logit_softcapping", 30.0),
        "sliding_window": int(keys.get("attention.sliding_window", 4096)),
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    return [rule for rule in dense_rules(metadata, head_norms=False) if rule.name != "output.weight"]


def example(sizes: Sizes) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}
    scale = {"query_pre_attn_scalar": sizes.head_dim, "sliding_window": sizes.window}
    return gemma_example(sizes, "gemma2", "Gemma2ForCausalLM", **caps, **scale)


MAP = ArchMap(
    arch="gemma2",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    ignored=("lm_head.",),  # the embedding again, where a checkpoint has it
)
