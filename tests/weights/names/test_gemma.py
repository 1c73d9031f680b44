"""Gemma 2, 3 and 4: config.json to GGUF keys and back, and which tensors there must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffharness.errors import ArtifactFileError, CheckpointError
from diffharness.weights.names import for_config, gemma2, gemma3, gemma4

SLIDING, GLOBAL = "sliding_attention", "full_attention"

# The text model of an image-and-text checkpoint states little.
GEMMA3_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
GEMMA2_27B: dict[str, Any] = {
    "model_type": "gemma2",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 144,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}


def gemma4_config(**more: Any) -> dict[str, Any]:
    """Six layers, as the classes would complete them."""
    return {
        "model_type": "gemma4_text",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 0,
        "vocab_size": 100,
        "final_logit_softcapping": 30.0,
    } | more


def test_gemma3_completes_what_a_nested_config_leaves_out() -> None:
    metadata = for_config(GEMMA3_4B).metadata(GEMMA3_4B)
    said = {
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 256,
        "attention.sliding_window": 1024,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "context_length": 131072,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "vocab_size": 262208,
    }
    assert {key: metadata[f"gemma3.{key}"] for key in said} == said
    assert "gemma3.attention.sliding_window_pattern" not in metadata  # five to one is what a reader assumes
    assert "gemma3.attention.scale" not in metadata


def test_gemma3_without_sliding_layers_has_no_window() -> None:
    config = {**GEMMA3_4B["text_config"], "layer_types": [GLOBAL] * 34}
    metadata = gemma3.metadata(config)
    assert "gemma3.attention.sliding_window" not in metadata
    assert gemma3.config(metadata)["layer_types"] == [GLOBAL] * 34


def test_gemma2_27b_needs_no_key_for_its_scale() -> None:
    assert "gemma2.attention.scale" not in gemma2.metadata(GEMMA2_27B)
    assert gemma2.config(gemma2.metadata(GEMMA2_27B))["query_pre_attn_scalar"] == 144


def test_gemma2_says_another_scale_and_another_pattern() -> None:
    kinds = [GLOBAL, SLIDING, SLIDING]
    changed = {"query_pre_attn_scalar": 224, "num_hidden_layers": 3, "layer_types": kinds}
    metadata = gemma2.metadata(GEMMA2_27B | changed)
    assert metadata["gemma2.attention.scale"] == pytest.approx(224**-0.5)
    assert metadata["gemma2.attention.sliding_window_pattern"] == [False, True, True]
    back = gemma2.config(metadata)
    assert (back["query_pre_attn_scalar"], back["layer_types"]) == (224, kinds)


def test_gemma2_without_caps_says_so() -> None:
    metadata = gemma2.metadata(GEMMA2_27B | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert metadata["gemma2.attn_logit_softcapping"] == 0.0
    assert gemma2.config(metadata)["final_logit_softcapping"] is None
    assert gemma2.metadata(GEMMA2_27B)["gemma2.attn_logit_softcapping"] == 50.0


def test_gemma4_globals_from_flat_keys_and_from_overrides_are_the_same() -> None:
    flat = gemma4_config(attention_k_eq_v=True, num_global_key_value_heads=1)
    override = {"head_dim": 64, "num_key_value_heads": 1}
    nested = gemma4_config(attention_k_eq_v=True, per_layer_config={"05": override})
    assert gemma4.metadata(flat) == gemma4.metadata(nested)
    assert gemma4.metadata(flat)["gemma4.attention.head_count_kv"] == [2, 2, 2, 2, 2, 1]
    back = gemma4.config(gemma4.metadata(flat))
    assert (back["attention_k_eq_v"], back["num_global_key_value_heads"], back["global_head_dim"]) == (True, 1, 64)


def test_gemma4_flat_number_of_global_heads_counts_only_with_keys_as_values() -> None:
    metadata = gemma4.metadata(gemma4_config(num_global_key_value_heads=1))
    assert metadata["gemma4.attention.head_count_kv"] == 2


def test_gemma4_wide_mlps_are_those_of_borrowing_layers() -> None:
    kinds = [SLIDING, GLOBAL] * 3
    metadata = gemma4.metadata(gemma4_config(layer_types=kinds, num_kv_shared_layers=2, use_double_wide_mlp=True))
    assert metadata["gemma4.feed_forward_length"] == [96, 96, 96, 96, 192, 192]
    rules = {rule.name: rule for rule in gemma4.rules(metadata)}
    assert rules["blk.4.ffn_gate.weight"].shape == (192, 64)
    assert [rules[f"blk.{il}.attn_k.weight"].required for il in range(6)] == [True] * 4 + [False] * 2


def test_gemma4_last_layer_is_global_whatever_is_listed() -> None:
    metadata = gemma4.metadata(gemma4_config(layer_types=[SLIDING] * 6))
    assert metadata["gemma4.attention.sliding_window_pattern"] == [True] * 5 + [False]


def test_gemma4_only_the_share_that_turns_is_left_alone() -> None:
    assert gemma4.rope_divisors(16, 0.25).tolist() == [1.0] * 2 + [np.float32(1e30)] * 6
    rope = {SLIDING: gemma4.ROPE[SLIDING], GLOBAL: gemma4.ROPE[GLOBAL] | {"partial_rotary_factor": 0.5}}
    metadata = gemma4.metadata(gemma4_config(rope_parameters=rope))
    (rule,) = (rule for rule in gemma4.rules(metadata) if rule.name == "rope_freqs.weight")
    assert rule.values is not None
    assert (rule.values() == 1).sum() == 16  # half of the 32 pairs of a global head
    assert gemma4.config(metadata)["rope_parameters"][GLOBAL]["partial_rotary_factor"] == 0.5


def test_gemma4_values_of_globals_may_be_missing_and_of_sliding_layers_not() -> None:
    rules = {rule.name: rule for rule in gemma4.rules(gemma4.metadata(gemma4_config()))}
    assert [rules[f"blk.{il}.attn_v.weight"].required for il in range(6)] == [True] * 5 + [False]


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_unified"])
def test_gemma4_inside_an_image_model(model_type: str) -> None:
    config = {"model_type": model_type, "text_config": gemma4_config(), "vision_config": {}}
    assert for_config(config).metadata(config) == gemma4.metadata(gemma4_config())
    embedding = gemma4.rules(gemma4.metadata(gemma4_config()))[0]
    assert [names for names, _ in embedding.aliases] == [
        ("model.language_model.embed_tokens.weight",),
        ("language_model.model.embed_tokens.weight",),
    ]


def test_gemma4_float_read_back_from_float32_is_the_decimal_that_was_written() -> None:
    metadata = gemma4.metadata(gemma4_config(rms_norm_eps=1e-6))
    metadata["gemma4.attention.layer_norm_rms_epsilon"] = float(np.float32(1e-6))
    assert gemma4.config(metadata)["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (GEMMA2_27B | {"tie_word_embeddings": False}, "tied head"),
        (GEMMA2_27B | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "plain rope"),
        (GEMMA2_27B | {"attention_bias": True}, "biases"),
        (GEMMA2_27B | {"layer_types": [SLIDING]}, "layer_types"),
        (GEMMA2_27B | {"hidden_activation": "silu"}, "activation"),
        (GEMMA3_4B["text_config"] | {"use_bidirectional_attention": True}, "causal"),
        (GEMMA3_4B["text_config"] | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (gemma4_config(use_bidirectional_attention="all"), "causal"),
        (gemma4_config(rope_parameters={GLOBAL: {"rope_type": "yarn"}}), "proportional"),
        (gemma4_config(enable_moe_block=True), "num_experts"),
        (gemma4_config(num_key_value_heads=0), "num_key_value_heads"),
        (GEMMA2_27B | {"head_dim": 0}, "head_dim"),
        (gemma4_config(layer_types=["chunked_attention"] * 6), "layer_types"),
    ],
)
def test_what_the_gguf_form_cannot_hold_is_an_error(config: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        for_config(config).metadata(config)


@pytest.mark.parametrize("arch", [gemma2, gemma3, gemma4])
def test_missing_keys_of_a_file_are_named(arch: Any) -> None:
    with pytest.raises(ArtifactFileError, match="required metadata key"):
        arch.rules({"general.architecture": arch.MAP.arch})
