"""What becomes of a checkpoint's tensors that no rule reads, by their names."""

from __future__ import annotations

import pytest

from diffharness.weights.unread import sort_out

READ = ["model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.1.norm.weight", "model.norm.weight", "lm_head.w"]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.0.mlp.router.bias", "mattering"),
        ("model.layers.2.norm.weight", "mattering"),
        ("model.wpe.weight", "mattering"),
        ("lm_head.b", "mattering"),
        ("model.visual.blocks.0.norm.weight", "ignored"),
        ("model.layers.61.norm.weight", "ignored"),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", "ignored"),
        ("model.position_ids", "ignored"),
        ("visual.norm.weight", "extra"),
        ("value_head.w", "extra"),
    ],
)
def test_by_name(name: str, where: str) -> None:
    found = sort_out([*READ, name], READ, ("model.visual.", "model.layers.61."))
    assert {kind: names for kind, names in vars(found).items() if names} == {where: [name]}


def test_a_layer_that_is_read_is_never_ignored() -> None:
    read = [*READ, "model.layers.61.norm.weight"]
    found = sort_out([*read, "model.layers.61.norm.bias"], read, ("model.layers.61.",))
    assert found.mattering == ["model.layers.61.norm.bias"]


def test_layers_without_a_prefix_are_a_model_of_which_everything_matters() -> None:
    found = sort_out(["h.0.w", "surprise", "h.0.attn.bias"], ["h.0.w"], ("h.0.attn.bias",))
    assert found.mattering == ["surprise"] and found.ignored == ["h.0.attn.bias"]
