"""config.json to GGUF keys: both forms of a config, what is required, what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from diffharness.errors import ArtifactFileError, CheckpointError
from diffharness.weights import names
from diffharness.weights.names import _config

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def metadata(**changes: Any) -> dict[str, Any]:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    return names.for_config(config).metadata(config)


def test_the_keys_of_a_plain_llama() -> None:
    assert metadata(rope_theta=10000) == {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": 100,
        "llama.rope.dimension_count": 16,
        "diffharness.tied_head": True,
    }


def test_kv_heads_default_to_heads_and_a_stated_head_size_is_written() -> None:
    found = metadata(num_key_value_heads=None, head_dim=32)
    assert found["llama.attention.head_count_kv"] == 4
    assert found["llama.attention.key_length"] == found["llama.attention.value_length"] == 32
    assert found["llama.rope.dimension_count"] == 32


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default"}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, {"rope_type": "llama3", **LLAMA3}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN}}, {"rope_type": "yarn", **YARN}),
    ],
    ids=["default", "linear", "llama3", "yarn"],
)
def test_old_and_new_rope_forms_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert metadata(**old) == metadata(rope_parameters={"rope_theta": 5e5, **new})


def test_yarn_keys() -> None:
    stated = {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2}
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32, **stated}
    found = {key: value for key, value in metadata(rope_parameters=rope).items() if ".rope.scaling." in key}
    assert found == {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
        "llama.rope.scaling.yarn_attn_factor": 1.5,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
        "llama.rope.scaling.yarn_beta_slow": 2.0,
    }


def test_yarns_mscale_becomes_a_factor() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
    found = metadata(rope_parameters=rope | {"mscale": 1.0, "mscale_all_dim": 0.5})
    expected = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert found["llama.rope.scaling.yarn_attn_factor"] == pytest.approx(expected)


def test_rope_of_one_layer_type_among_several() -> None:
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    config = CONFIG | {"rope_parameters": nested}
    full = _config.rope_parameters(config, default_theta=1.0, layer_type="full_attention")
    sliding = _config.rope_parameters(config, default_theta=1.0, layer_type="sliding_attention")
    assert (full["rope_theta"], sliding["rope_theta"]) == (1e6, 1e4)


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "rms_norm_eps", "vocab_size"]
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        metadata(**{key: ...})


@pytest.mark.parametrize(
    ("changes", "names_it"),
    [
        ({"hidden_size": "64"}, "hidden_size"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncation"),
        ({"model_type": "rwkv7"}, "rwkv7"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": [0]}, "mlp_only_layers"),
    ],
)
def test_what_cannot_be_expressed_is_refused(changes: dict[str, Any], names_it: str) -> None:
    with pytest.raises(CheckpointError, match=names_it):
        metadata(**changes)


def test_unknown_architectures_name_the_known_ones() -> None:
    with pytest.raises(ArtifactFileError, match=r"'rwkv7'.*llama.*qwen3moe"):
        names.for_arch("rwkv7")


def test_the_text_part_of_a_config_decides_where_the_whole_is_unknown() -> None:
    assert names.for_config({"model_type": "some_vlm", "text_config": CONFIG}).arch == "llama"


def test_divisors_are_one_for_fast_pairs_and_the_factor_for_slow_ones() -> None:
    divisors = _config.llama3_divisors(128, 5e5, factor=8.0, low=1.0, high=4.0, original=8192.0)
    assert divisors.shape == (64,) and divisors.dtype == np.float32
    assert divisors[0] == 1.0 and divisors[-1] == 8.0
    assert (np.diff(divisors) >= 0).all()
    turns = 8192 * 5e5 ** (-np.arange(64) / 64) / (2 * math.pi)
    assert (divisors[turns > 4.001] == 1).all() and (divisors[turns < 0.999] == 8).all()
    middle = (turns < 4) & (turns > 1)
    share = (turns[middle] - 1) / 3
    assert middle.any()
    np.testing.assert_allclose(divisors[middle], 1 / ((1 - share) / 8 + share), rtol=1e-5)


# -- rules ---------------------------------------------------------------------------------------------


def rule_names(found: dict[str, Any]) -> dict[str, bool]:
    """Names of the tensors, and whether they are required."""
    rules = names.for_arch(found["general.architecture"]).rules(found)
    assert len({rule.name for rule in rules}) == len(rules)
    return {rule.name: rule.required for rule in rules}


def test_the_head_is_required_absent_or_optional() -> None:
    tied, untied, unknown = metadata(), metadata(tie_word_embeddings=False), metadata()
    del unknown["diffharness.tied_head"]  # as in a GGUF from elsewhere
    assert "output.weight" not in rule_names(tied)
    assert rule_names(untied)["output.weight"] is True
    assert rule_names(unknown)["output.weight"] is False


def test_llama3_divisors_are_computed_for_a_checkpoint_and_optional_in_a_file() -> None:
    found = metadata(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    (rule,) = [rule for rule in names.for_arch("llama").rules(found) if rule.name == "rope_freqs.weight"]
    assert rule.required and rule.values is not None and rule.values().shape == rule.shape == (8,)
    assert rule_names(metadata())["rope_freqs.weight"] is False


def test_vocabulary_size_from_the_tokenizers_list() -> None:
    found = metadata()
    del found["llama.vocab_size"]
    with pytest.raises(ArtifactFileError, match="vocab_size"):
        rule_names(found)
    found["tokenizer.ggml.tokens"] = ["a"] * 77
    (rule,) = [rule for rule in names.for_arch("llama").rules(found) if rule.name == "token_embd.weight"]
    assert rule.shape == (77, 64)


def test_config_with_what_only_tensors_tell() -> None:
    config = names.config_of_tensors(CONFIG, ["output.weight", "blk.0.attn_output.bias", "blk.0.ffn_down.bias"])
    assert (config["tie_word_embeddings"], config["attention_bias"], config["mlp_bias"]) == (False, True, True)
    plain = names.config_of_tensors(CONFIG, ["token_embd.weight"])
    assert plain["tie_word_embeddings"] is True and "attention_bias" not in plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 1 << 31),
        ("block_count", 5000),
        ("block_count", "two"),
        ("embedding_length", -1),
        ("embedding_length", [64, 64]),
        ("feed_forward_length", [96]),
        ("attention.head_count", None),
        ("expert_count", 1 << 20),
    ],
)
def test_hostile_sizes_are_refused_before_anything_is_made_of_them(key: str, value: Any) -> None:
    found = metadata() | {f"llama.{key}": value}
    with pytest.raises(ArtifactFileError, match=key):
        names.for_arch("llama").rules(found)
