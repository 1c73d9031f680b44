"""`mistral3`: Mistral Small 3 and Ministral 3, text, alone or inside the image-and-text model. Llama's tensors.

Ministral 3's rope always is YaRN and carries `llama_4_scaling_beta`, by which queries grow with their position. The
engine takes `mscale` for 1: where it is not, the magnitude is stated as `yarn_attn_factor`, which the engine does not
read.
"""

from __future__ import annotations

from typing import Any

from diffharness.weights.names import llama
from diffharness.weights.names._config import expect_activation, need_float, need_int, rope_parameters
from diffharness.weights.names._keys import TIED_HEAD, Keys, decoder_config, decoder_example, decoder_metadata
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._nested import with_nested_names
from diffharness.weights.source import Metadata

_ARCH = "mistral3"
_HEAD_DIM = 128  # where config.json does not state one


def metadata(config: Config) -> dict[str, Any]:
    inner = config.get("text_config") or config
    expect_activation(inner, "silu")
    out = decoder_metadata(inner, _ARCH, default_theta=1e6, head_dim=_HEAD_DIM)
    if inner is not config and "tie_word_embeddings" not in inner:
        del out[TIED_HEAD]  # published configs say it in one part or the other, or not at all
    out[f"{_ARCH}.rope.dimension_count"] = Keys(out).head_dim
    if inner.get("sliding_window"):
        out[f"{_ARCH}.attention.sliding_window"] = need_int(inner, "sliding_window")
    rope = rope_parameters(inner, default_theta=1e6)
    if rope.get("llama_4_scaling_beta"):
        out[f"{_ARCH}.attention.temperature_scale"] = need_float(rope, "llama_4_scaling_beta")
        out.setdefault(f"{_ARCH}.rope.scaling.original_context_length", rope["original_max_position_embeddings"])
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim") and rope.get("attention_factor") is None:
        out[f"{_ARCH}.rope.scaling.yarn_log_multiplier"] = need_float(rope, "mscale_all_dim")
        if rope.get("mscale", 1.0) == 1.0:
            out.pop(f"{_ARCH}.rope.scaling.yarn_attn_factor", None)
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    out = decoder_config(metadata, _ARCH) | {"hidden_act": "silu"}
    out["sliding_window"] = keys.get("attention.sliding_window", 0) or None
    rope: dict[str, Any] = {"rope_type": "default"} | (out.pop("rope_scaling", None) or {})
    rope["rope_theta"] = out.pop("rope_theta")
    if "factor" in rope and "attention_factor" not in rope and keys.get("rope.scaling.yarn_log_multiplier"):
        rope |= {"mscale": 1.0, "mscale_all_dim": keys["rope.scaling.yarn_log_multiplier"]}
    rope |= {
        "llama_4_scaling_beta": keys.get("attention.temperature_scale", 0.0),
        "original_max_position_embeddings": keys.get("rope.scaling.original_context_length", keys["context_length"]),
    }
    named = {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3"}
    return named | out | {"rope_parameters": rope}


def rules(metadata: Metadata) -> list[TensorRule]:
    return with_nested_names(llama.rules(metadata))


def example(sizes: Sizes) -> dict[str, Any]:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 5e3,
        "factor": 4.0,
        "original_max_position_embeddings": 24,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "llama_4_scaling_beta": 0.5,
    }
    out = decoder_example(sizes, "ministral3", "Ministral3ForCausalLM", rope_parameters=rope)
    del out["rope_theta"]
    return out


MAP = ArchMap(
    arch=_ARCH,
    model_types=("mistral3", "ministral3"),
    architectures=("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
