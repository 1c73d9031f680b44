"""Layouts of recurrent layers' tensors: there and back, and what they mean by example."""

from __future__ import annotations

import numpy as np
import pytest

from diffharness.errors import CheckpointError
from diffharness.weights import names
from diffharness.weights.names._map import Layout, RotaryPairs, Shaped
from diffharness.weights.names._reorder import MINUS_EXP, Chained, PartPairs, Pieces, Scaled, Tiled, decays
from diffharness.weights.source import Float32Array
from diffharness.weights.synth import SynthSource


def rows(*shape: int) -> Float32Array:
    return np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    "layout",
    [
        Tiled(2, 6, 2),
        Tiled(3, 6, size=1, first=6),
        Tiled(2, 4, size=1, axis=1),
        PartPairs(2, 4),
        Chained((Shaped((12, 4), (12, 1, 4)), Tiled(2, 6, 2))),
        Scaled((2.0, 0.5), ((4, 0.25), (8, 4.0))),
    ],
)
def test_layouts_are_exact_in_both_directions(layout: Layout) -> None:
    tensor = rows(12, 4)
    [there] = layout.to_hf(tensor)
    assert np.array_equal(layout.to_gguf([there]), tensor)


def test_tiled_heads_are_the_first_of_each_group_and_then_the_second() -> None:
    heads = np.repeat(rows(6), 2)  # two elements a head, in groups of three heads
    assert Tiled(2, 6, 2).to_gguf([heads])[::2].tolist() == [0, 3, 1, 4, 2, 5]
    kept = np.concatenate((rows(4) + 100, heads))
    assert Tiled(2, 6, 2, first=4).to_gguf([kept])[:4].tolist() == [100, 101, 102, 103]


def test_part_pairs_leave_what_does_not_turn() -> None:
    assert PartPairs(1, 4).to_gguf([rows(8)]).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert np.array_equal(PartPairs(2, 4).to_gguf([rows(8)]), RotaryPairs(2).to_gguf([rows(8)]))


def test_pieces_put_back_make_the_whole() -> None:
    whole = rows(8, 3)
    by_group = (2, 4, 3)
    first = Pieces((8, 3), lambda w: w.reshape(by_group)[:, :1], others=(lambda w: w.reshape(by_group)[:, 2:],))
    rest = Pieces((8, 3), lambda w: w.reshape(by_group)[:, 1:2])
    assert first.to_gguf([whole])[:, 0].tolist() == [0, 12, 6, 9, 18, 21]
    made = np.zeros_like(whole)
    for piece in (first, rest):
        piece.put(piece.to_gguf([whole]), made)
    assert np.array_equal(made, whole)


def test_decays_are_drawn_so_that_both_forms_are_exact() -> None:
    a = decays(0.05, 16.0)(np.random.default_rng(0), (2000,))
    assert (a < 0).all() and np.array_equal(MINUS_EXP.to_gguf(MINUS_EXP.to_hf(a)), a)


def test_a_model_type_of_two_architectures_is_told_by_its_config() -> None:
    for arch in ("nemotron_h", "nemotron_h_moe"):
        assert names.for_config(SynthSource(arch).config).arch == arch


@pytest.mark.parametrize(
    ("arch", "change"),
    [
        ("qwen3next", {"norm_topk_prob": False}),
        ("qwen3next", {"layer_types": ["full_attention"]}),
        ("mamba2", {"time_step_limit": [0.0, 1.0]}),
        ("mamba", {"use_bias": True}),
        ("falcon-h1", {"mamba_conv_bias": False}),
        ("nemotron_h", {"layers_block_type": ["mlp", "moe"]}),
        ("granitehybrid", {"layer_types": ["attention"] * 4}),
        ("lfm2", {"conv_bias": True}),
        ("jamba", {"mamba_proj_bias": True}),
        ("kimi-linear", {"q_lora_rank": 8}),
    ],
)
def test_a_config_without_a_form_in_gguf_is_refused(arch: str, change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        SynthSource(arch, changes=change)
