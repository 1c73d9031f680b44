from __future__ import annotations

import numpy as np
import pytest

from diffharness.forensics.metadata import account, differences, repaired, unread
from diffharness.reference import archs

BASE = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 16,
    "llama.context_length": 8192,
}


def used(artifact, checkpoint):
    return {row.key: row.used for row in differences(artifact, checkpoint, "llama")}


def without(key: str) -> dict[str, object]:
    return {k: v for k, v in BASE.items() if k != key}


def test_the_base_describes_a_model() -> None:
    assert archs.build(BASE) == archs.build(dict(BASE))


def test_float32_names_and_tokenizer_are_no_difference() -> None:
    stored = {
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.attention.head_count_kv": [2, 2],
        "general.name": "x",
        "tokenizer.ggml.model": "gpt2",
    }
    assert used(BASE | stored, BASE) == {}


@pytest.mark.parametrize(
    ("key", "value"), [("llama.rope.freq_base", 1e4), ("llama.attention.layer_norm_rms_epsilon", 1e-6)]
)
def test_a_wrong_value_that_the_forward_reads_counts(key: str, value: float) -> None:
    (row,) = differences(BASE | {key: value}, BASE, "llama")
    assert (row.key, row.artifact, row.checkpoint, row.used) == (key, value, BASE[key], True)


def test_a_value_that_the_forward_does_not_read_is_listed_as_that() -> None:
    assert used(BASE | {"llama.context_length": 4096}, BASE) == {"llama.context_length": False}


def test_a_missing_key_counts_only_if_its_default_is_another() -> None:
    assert used(without("llama.rope.dimension_count"), BASE) == {}
    assert used(without("llama.rope.freq_base"), BASE) == {"llama.rope.freq_base": True}


def test_a_missing_key_without_which_there_is_no_model_counts() -> None:
    assert used(without("llama.attention.layer_norm_rms_epsilon"), BASE) == {
        "llama.attention.layer_norm_rms_epsilon": True
    }


def test_a_factor_counts_though_it_means_nothing_without_its_kind() -> None:
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 4096,
    }
    found = used(BASE, BASE | yarn)
    assert found["llama.rope.scaling.type"] and found["llama.rope.scaling.factor"]


def test_repair_replaces_and_removes() -> None:
    assert repaired({"a": 1, "b": 2}, {"a": 3, "b": None}) == {"a": 3}


SPECIAL = {"tokenizer.ggml.eos_token_id": [2, 7], "tokenizer.ggml.bos_token_id": [1]}
VOCABULARY = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 7}


def accounted(artifact):
    return {row.key: (row.used, row.checkpoint) for row in account(artifact, BASE, "llama", special=SPECIAL)}


def test_an_account_of_the_same_metadata_is_empty() -> None:
    assert accounted(BASE | VOCABULARY) == {}


def test_special_tokens_that_no_file_of_the_checkpoint_gives_count() -> None:
    found = accounted(BASE | VOCABULARY | {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 9})
    assert found == {
        "tokenizer.ggml.bos_token_id": (True, 1),
        "tokenizer.ggml.eos_token_id": (True, [2, 7]),
    }


def test_a_missing_special_token_is_told_where_there_is_a_vocabulary() -> None:
    without_eos = {k: v for k, v in VOCABULARY.items() if "eos" not in k}
    assert accounted(BASE | without_eos) == {"tokenizer.ggml.eos_token_id": (False, [2, 7])}
    assert accounted(BASE) == {}


def test_keys_that_nothing_reads_are_listed() -> None:
    made_up = {"llama.made_up": 3, "qwen2.made_up": 3}
    assert unread(BASE | made_up, "llama") == ["llama.feed_forward_length", "llama.context_length", "llama.made_up"]
    (row,) = account(BASE | made_up, BASE, "llama")
    assert (row.key, row.used, row.note) == ("llama.made_up", False, "nothing reads it")
    assert unread({"general.architecture": "llama", "llama.x": 1}, "llama") == []
