"""What the maps of Llama's relatives say in their own way: nested checkpoints, forms of config.json, layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffharness.errors import CheckpointError
from diffharness.reference.archs import build
from diffharness.weights import names
from diffharness.weights.names import baichuan
from diffharness.weights.names._map import Sizes
from diffharness.weights.names.smollm3 import ROPE_LAYERS
from diffharness.weights.synth import SynthSource


def metadata(arch: str, **changes: Any) -> dict[str, Any]:
    """GGUF keys of an architecture's example with some keys of config.json changed; `...` leaves one out."""
    config = {key: value for key, value in (example(arch) | changes).items() if value is not ...}
    return names.for_config(config).metadata(config)


def example(arch: str) -> dict[str, Any]:
    return names.for_arch(arch).example(Sizes())


def nested(**text: Any) -> dict[str, Any]:
    return {"model_type": "mistral3", "text_config": example("mistral3") | {"model_type": "mistral"} | text}


def test_mistral3_inside_an_image_model_is_the_text_model() -> None:
    alone, inside = metadata("mistral3"), names.for_config(nested()).metadata(nested())
    assert inside == alone
    for rule in names.for_arch("mistral3").rules(inside):
        spellings = [rule.hf, *(parts for parts, _ in rule.aliases)]
        if rule.name == "blk.0.attn_q.weight":
            below = "layers.0.self_attn.q_proj.weight"
            prefixes = ("model.", "language_model.model.", "model.language_model.")
            assert spellings == [(prefix + below,) for prefix in prefixes]
        if rule.name == "output.weight":
            assert ("language_model.lm_head.weight",) in spellings


def test_mistral3_whose_parts_do_not_say_whether_the_head_is_tied() -> None:
    config = nested()
    del config["text_config"]["tie_word_embeddings"]
    rules = {rule.name: rule for rule in names.for_arch("mistral3").rules(names.for_config(config).metadata(config))}
    assert not rules["output.weight"].required


def test_mistral3_states_the_magnitude_where_the_engine_cannot_know_it() -> None:
    rope = example("mistral3")["rope_parameters"]
    key = "mistral3.rope.scaling.yarn_attn_factor"
    assert key not in metadata("mistral3")
    log = 0.1 * np.log(4.0)
    stated = metadata("mistral3", rope_parameters=rope | {"mscale": 0.7})[key]
    assert stated == pytest.approx((0.7 * log + 1) / (0.5 * log + 1))


def test_smollm3_says_only_another_pattern_than_every_fourth() -> None:
    assert ROPE_LAYERS not in metadata("smollm3")
    assert ROPE_LAYERS not in metadata("smollm3", no_rope_layers=[1, 1, 1, 0, 1])
    assert metadata("smollm3", no_rope_layers=[0, 1, 1, 1, 0])[ROPE_LAYERS] == [False, True, True, True, False]


@pytest.mark.parametrize("pattern", ["LLLG", 4, None])
def test_exaone4_patterns_as_letters_and_as_a_period(pattern: str | int | None) -> None:
    found = metadata("exaone4", layer_types=None, sliding_window=..., sliding_window_pattern=pattern)
    assert found["exaone4.attention.sliding_window"] == 4096
    assert found["exaone4.attention.sliding_window_pattern"] == [True, True, True, False]


def test_exaone4_inside_an_image_model_is_the_text_model() -> None:
    config = {"model_type": "exaone4_5", "text_config": example("exaone4") | {"model_type": "exaone4_5_text"}}
    assert names.for_config(config).metadata(config) == metadata("exaone4")


@pytest.mark.parametrize("arch", ["exaone4", "exaone-moe"])
def test_exaone_layers_that_predict_further_tokens_are_further_blocks(arch: str) -> None:
    made = metadata(arch, num_nextn_predict_layers=1)
    n_layer = metadata(arch)[f"{arch}.block_count"]
    assert made[f"{arch}.block_count"] == n_layer + 1
    further = {r.name: r for r in names.for_arch(arch).rules(made) if r.name.startswith(f"blk.{n_layer}.")}
    assert not any(rule.required for rule in further.values())
    assert further[f"blk.{n_layer}.nextn.eh_proj.weight"].hf == ("mtp.fc.weight",)
    assert further[f"blk.{n_layer}.attn_q.weight"].hf == ("mtp.layers.0.self_attn.q_proj.weight",)
    assert build(made).n_layer == n_layer


def test_baichuan_2_rows_of_the_head_have_length_one() -> None:
    shape = (baichuan._VOCABULARY_2, 8)
    made = metadata("baichuan", vocab_size=shape[0], hidden_size=8)
    [rule] = [rule for rule in names.for_arch("baichuan").rules(made) if rule.name == "output.weight"]
    rows = np.random.default_rng(0).standard_normal((1000, 8), dtype=np.float32)
    once = rule.layout.to_gguf([rows])
    np.testing.assert_allclose(np.linalg.norm(once, axis=1), 1.0, rtol=1e-6)
    assert np.array_equal(rule.layout.to_gguf([once]), once)
    assert np.array_equal(SynthSource("baichuan").rules["output.weight"].layout.to_gguf([rows]), rows)


def deci(attention: dict[str, Any], ffn: dict[str, Any]) -> dict[str, Any]:
    return metadata("deci", num_hidden_layers=1, block_configs=[{"attention": attention, "ffn": ffn}])


GROUPED, WIDE = {"n_heads_in_group": 2, "no_op": False}, {"ffn_mult": 6.0}


@pytest.mark.parametrize(
    ("attention", "ffn", "expected"),
    [
        (GROUPED, WIDE, (4, 2, 256)),
        ({"n_heads_in_group": None, "replace_with_linear": True}, WIDE, (4, 0, 256)),
        ({"n_heads_in_group": None, "no_op": True}, WIDE, (0, 0, 256)),
        (GROUPED, {"ffn_mult": None, "no_op": True}, (4, 2, 0)),
    ],
)
def test_deci_layers_in_gguf_words(
    attention: dict[str, Any], ffn: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    keys = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    assert tuple(deci(attention, ffn)[f"deci.{key}"][0] for key in keys) == expected


@pytest.mark.parametrize(
    ("arch", "changes", "says"),
    [
        ("deci", {"num_hidden_layers": 2}, "layers described"),
        ("deci", {"block_configs": [{"attention": GROUPED | {"is_mamba": True}, "ffn": WIDE}]}, "is_mamba"),
        ("deci", {"block_configs": [{"attention": GROUPED, "ffn": {"replace_with_linear": True}}]}, "replace_with"),
        ("baichuan", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("internlm2", {"bias": True}, "bias"),
        ("exaone", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("exaone-moe", {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, "before all sparse"),
        ("qwen", {"rotary_pct": 0.25}, "rotary_pct"),
        ("xverse", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("arcee", {"hidden_act": "silu"}, "activation"),
    ],
)
def test_what_has_no_gguf_form_is_refused(arch: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        metadata(arch, **changes)
