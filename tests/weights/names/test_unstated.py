"""What config.json leaves out is what the class assumes; what it says and GGUF cannot is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from diffharness.errors import CheckpointError
from diffharness.weights import names
from diffharness.weights.names._map import Sizes

Config = dict[str, Any]

ASSUMED = {
    ("deepseek2", "deepseek_v3"): ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
    ("deepseek2", "deepseek_v2"): ("n_shared_experts",),
    ("deepseek2", "glm4_moe_lite"): ("n_shared_experts", "norm_topk_prob", "routed_scaling_factor"),
    ("exaone-moe", "exaone_moe"): ("num_shared_experts", "routed_scaling_factor"),
    ("gemma4", "gemma4_text"): ("sliding_window",),
    ("gemma4", "gemma4_unified_text"): ("sliding_window",),
}
CASES = [(arch, model_type, key) for (arch, model_type), keys in ASSUMED.items() for key in keys]


def example(arch: str, **changes: Any) -> Config:
    return names.for_arch(arch).example(Sizes()) | changes


@pytest.mark.parametrize(("arch", "model_type", "key"), CASES)
def test_a_key_left_out_is_the_classs_default(arch: str, model_type: str, key: str) -> None:
    stated = example(arch, model_type=model_type, **{key: getattr(AutoConfig.for_model(model_type), key)})
    left_out = {name: value for name, value in stated.items() if name != key}
    metadata = names.for_arch(arch).metadata
    assert metadata(left_out) == metadata(stated)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("command-r", {"head_dim": 32}),
        ("deepseek", {"scoring_func": "sigmoid"}),
        ("exaone-moe", {"scoring_func": "softmax"}),
        ("grok", {"hidden_act": "silu"}),
        ("llama4", {"no_rope_layers": None, "no_rope_layer_interval": 3}),
        ("mpt", {"attn_config": {"sliding_window_size": 32}}),
        ("mpt", {"attn_config": {"qk_gn": True}}),
        ("qwen", {"scale_attn_weights": False}),
    ],
)
def test_what_gguf_cannot_say_is_refused(arch: str, changes: Config) -> None:
    arch_map = names.for_arch(arch)
    arch_map.metadata(example(arch))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        arch_map.metadata(example(arch, **changes))


def test_bailing_must_say_whether_experts_weights_sum_to_one() -> None:
    config = example("bailingmoe")
    del config["norm_topk_prob"]
    with pytest.raises(CheckpointError, match="norm_topk_prob"):
        names.for_arch("bailingmoe").metadata(config)
