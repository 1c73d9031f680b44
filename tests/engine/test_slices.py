"""Slices of layers as data: what is cut, what cannot be, and which slices are run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness.engine.slice_file import write_slice
from diffharness.engine.slices import Slice, can_run, cut, layer_bytes, obstacle, overrides_for, plan
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import write_gguf

from .conftest import GEMMA, N_VOCAB, InMemory, tiny

KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2


def with_keys(source: InMemory, **changes: Any) -> InMemory:
    keys = {f"{source.arch}.{name}": value for name, value in changes.items()}
    return replace(source, metadata={**source.metadata, **keys})


def test_what_is_said_by_layer_is_cut() -> None:
    metadata = {
        "general.architecture": "x",
        "x.block_count": 4,
        "x.embedding_length": 64,
        "x.attention.head_count": [4, 4, 2, 2],
        "x.attention.sliding_window_pattern": [True, False, True, False],
        "x.rope.dimension_sections": [8, 8, 0, 0],
        "x.leading_dense_block_count": 2,
        "x.context_length": 128,
    }
    assert cut(metadata, 1, 3) == {
        "x.block_count": 2,
        "x.attention.head_count": [4, 2],
        "x.attention.sliding_window_pattern": [False, True],
        "x.leading_dense_block_count": 1,
        "x.attention.key_length": 16,
        "x.attention.value_length": 16,
    }
    assert cut(metadata, 2, 4)["x.leading_dense_block_count"] == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attention.shared_kv_layers": 2}, "shared_kv_layers is 2"),
        ({"embedding_length_per_layer_input": 16}, "embedding_length_per_layer_input is 16"),
        ({"nextn_predict_layers": 1}, "nextn_predict_layers is 1"),
        ({"something.new": [1, 2]}, "something.new is an array"),
        ({"feed_forward_length": [1, 2, 3]}, "has 3 values for 2 layers"),
        ({"deepstack_mapping": [-1] * 8}, None),
        ({"deepstack_mapping": [-1, 0]}, "deepstack_mapping is [-1, 0], which ties layers"),
        ({"block_count": 1}, "1 layers"),
        ({}, None),
    ],
)
def test_obstacles(changes: dict[str, Any], told: str | None) -> None:
    found = obstacle(with_keys(tiny(), **changes))
    assert found is None if told is None else found is not None and told in found


def test_a_tensor_outside_of_the_layers_is_an_obstacle() -> None:
    source = tiny()
    more = replace(source, arrays={**source.arrays, "token_embd_norm.weight": np.ones(64, dtype=np.float32)})
    assert obstacle(more) == "token_embd_norm.weight works outside of the layers"
    del more.arrays["output_norm.weight"]  # type: ignore[attr-defined]
    assert obstacle(more) is None, "where it is the last norm, as lfm2 has it"


def test_overrides_of_the_whole_are_an_obstacle() -> None:
    assert obstacle(tiny(), ["llama.rope.freq_base=float:1"]) is None
    assert "override of llama.leading_dense_block_count" in (
        obstacle(tiny(), ["llama.leading_dense_block_count=int:1"]) or ""
    )
    scale = "llama.embedding_scale=float:2"
    assert overrides_for(Slice(0, 1), "llama", [scale]) == [scale]
    assert overrides_for(Slice(1, 2), "llama", [scale]) == []


def test_models_that_are_told_by_their_depth() -> None:
    deep = with_keys(tiny("gemma3", **GEMMA), block_count=62)
    assert "62 layers" in (obstacle(deep) or "")
    assert can_run(tiny("gemma3", **GEMMA), 1, 2) and not can_run(with_keys(deep, block_count=124), 62, 124)


def test_slices_are_as_long_as_the_budget_allows() -> None:
    source = tiny(num_hidden_layers=6)
    size, pieces = layer_bytes(source)[0], [(il, il + 1) for il in range(6)]
    head = N_VOCAB * 64 * 4
    by_two = plan(source, pieces, 2 * size + head)
    assert [(part.first, part.stop, part.rows) for part in by_two] == [
        (0, 2, None),
        (2, 4, None),
        (4, 6, slice(0, N_VOCAB)),
    ]
    assert [part.first for part in plan(source, pieces, 1 << 40)] == [0, 5], "what ends the model takes no tokens"
    assert [part.n_layer for part in plan(source, pieces, 1 << 40, most_layers=4)] == [4, 2]
    assert len(plan(source, [(0, 3), (3, 6)], 1)) > 2, "pieces are never cut, the head is"


def test_a_head_that_does_not_fit_goes_in_parts() -> None:
    source = tiny(num_hidden_layers=3, tie_word_embeddings=False)
    row = 64 * 6  # the embedding beside it takes half as much
    parts = plan(source, [(0, 1), (1, 2), (2, 3)], 2 * 40 * row)
    heads = [part for part in parts if part.rows is not None]
    assert [part.rows for part in heads] == [slice(0, 40), slice(40, 80), slice(80, 96)]
    assert [part.is_new for part in heads] == [True, False, False]
    assert {(part.first, part.stop) for part in heads} == {(2, 3)}


@pytest.mark.parametrize("tied", [True, False])
def test_the_file(tmp_path: Path, tied: bool) -> None:
    changes = {**GEMMA, "layer_types": KINDS} if tied else {"tie_word_embeddings": False}
    source = tiny("gemma3" if tied else "llama", num_hidden_layers=6, **changes)
    write_gguf(tmp_path / "whole.gguf", source, type_of=lambda info: "F16")
    tokens = np.array([3, 5, 90])
    with open_gguf(tmp_path / "whole.gguf") as whole:
        write_slice(whole, whole, tmp_path / "first.gguf", Slice(0, 2), tokens)
        write_slice(whole, whole, tmp_path / "last.gguf", Slice(4, 6, slice(10, 20)), tokens)
        with open_gguf(tmp_path / "first.gguf") as first, open_gguf(tmp_path / "last.gguf") as last:
            arch = whole.arch
            assert (first.metadata[f"{arch}.block_count"], first.metadata[f"{arch}.vocab_size"]) == (2, 3)
            assert first.metadata["tokenizer.ggml.model"] == "no_vocab"
            assert last.metadata[f"{arch}.embedding_scale"] == 1.0
            np.testing.assert_array_equal(first.read("token_embd.weight"), whole.read("token_embd.weight")[tokens])
            np.testing.assert_array_equal(last.read("blk.1.attn_q.weight"), whole.read("blk.5.attn_q.weight"))
            np.testing.assert_array_equal(last.read("output_norm.weight"), whole.read("output_norm.weight"))
            head = "token_embd.weight" if tied else "output.weight"
            np.testing.assert_array_equal(last.read(head), whole.read(head)[10:20])
            assert tied or not last.read("token_embd.weight").any(), "there for its size only"
            assert {info.type for name, info in last.tensors.items() if name != "token_embd.weight"} == {"F32"}
