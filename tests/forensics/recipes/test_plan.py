"""A recipe laid out on tensors: who wins, what stays, what is an error."""

from __future__ import annotations

import pytest

from diffharness.errors import SettingsError
from diffharness.forensics.recipes import IntN, Recipe, make_plan
from diffharness.weights.source import TensorInfo

SHAPES = {
    "token_embd.weight": (512, 256),
    "blk.0.attn_norm.weight": (256,),
    "blk.0.layer_output_scale.weight": (1,),
    "blk.0.attn_q.weight": (128, 256),
    "blk.0.ffn_gate_inp.weight": (8, 256),
    "blk.0.ffn_gate_exps.weight": (8, 64, 256),
    "blk.0.ffn_down_exps.weight": (8, 256, 64),
}
TENSORS = {name: TensorInfo(name, shape, "BF16", 2 * TensorInfo(name, shape, "", 0).n_elements)
           for name, shape in SHAPES.items()}  # fmt: skip
INT4 = {"bits": 4, "block": 32}


def recipe(tensors: dict[str, object], **more: object) -> Recipe:
    return Recipe.model_validate({"name": "mine", "tensors": tensors, **more})


def test_the_first_glob_wins_and_vectors_and_routers_stay() -> None:
    plan = make_plan(recipe({"*ffn_down*": "Q8_0", "*": INT4}), TENSORS)
    assert {name: tensor.scheme for name, tensor in plan.tensors.items()} == {
        "token_embd.weight": IntN(bits=4, block=32),
        "blk.0.attn_norm.weight": "F32",
        "blk.0.layer_output_scale.weight": "F32",
        "blk.0.attn_q.weight": IntN(bits=4, block=32),
        "blk.0.ffn_gate_inp.weight": "F32",
        "blk.0.ffn_gate_exps.weight": IntN(bits=4, block=32),
        "blk.0.ffn_down_exps.weight": "Q8_0",
    }
    assert plan.schemes == {"F32": 3, "int4 block 32": 3, "Q8_0": 1}
    assert plan.simulated_only == ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_gate_exps.weight"]


def test_bits_per_weight_count_everything() -> None:
    plan = make_plan(recipe({"*": "Q8_0"}), {name: TENSORS[name] for name in ("blk.0.attn_q.weight",)})
    assert plan.bits_per_weight == 8.5
    plan = make_plan(recipe({"*": INT4}), TENSORS)
    matrices = sum(TENSORS[name].n_elements for name in plan.simulated_only)
    others = sum(info.n_elements for info in TENSORS.values()) - matrices
    assert plan.n_bits == 4.5 * matrices + 32 * others
    assert plan.bits_per_weight == plan.n_bits / (matrices + others)


@pytest.mark.parametrize(
    ("glob", "chosen"),
    [
        ("blk.*.attn_norm.weight", "blk.0.attn_norm.weight"),
        ("*ffn_gate_inp.weight", "blk.0.ffn_gate_inp.weight"),
        ("blk.0.layer_output_scale.weight", "blk.0.layer_output_scale.weight"),
    ],
)
def test_what_is_spelled_out_is_meant(glob: str, chosen: str) -> None:
    plan = make_plan(recipe({glob: "F16"}), TENSORS)
    assert [name for name, tensor in plan.tensors.items() if tensor.rule] == [chosen]
    assert plan.tensors[chosen].scheme == "F16"


def test_what_no_glob_matches_keeps_its_type() -> None:
    plan = make_plan(recipe({"*ffn_gate*": INT4}), TENSORS)
    assert plan.tensors["blk.0.attn_q.weight"].scheme == "BF16"
    assert plan.tensors["blk.0.attn_norm.weight"].scheme == "F32"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"*attn_qkv*": "Q8_0", "*": "Q4_0"}, "none of 7 does"),
        ({"*norm*": "F16", "*": "Q4_0"}, "stay F32 unless they are spelled out"),
        ({"*": "Q4_0", "*attn_q*": "Q8_0"}, "taken by globs before it"),
    ],
)
def test_a_glob_that_chooses_nothing_is_an_error(tensors: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        make_plan(recipe(tensors), TENSORS)
    assert "recipe mine" in caught.value.message and caught.value.hint


def test_the_hint_spells_the_class_out() -> None:
    with pytest.raises(SettingsError) as caught:
        make_plan(recipe({"*norm*": "F16"}), TENSORS)
    assert caught.value.hint == "write blk.*.attn_norm.weight"


def test_rows_that_are_not_whole_blocks_need_a_way_out() -> None:
    tensors: dict[str, object] = {"*": "Q4_K"}
    with pytest.raises(SettingsError, match=r"rows of 64 in blk\.0\.ffn_down_exps\.weight"):
        make_plan(recipe(tensors), TENSORS)
    with pytest.raises(SettingsError, match="int8 block 128 does not fit"):
        make_plan(recipe(tensors, otherwise={"bits": 8, "block": 128}), TENSORS)
    plan = make_plan(recipe(tensors, otherwise=["Q5_K", "Q8_0", "F16"]), TENSORS)
    assert plan.fell_back == ["blk.0.ffn_down_exps.weight"]
    assert plan.tensors["blk.0.ffn_down_exps.weight"].scheme == "Q8_0"
    assert plan.tensors["blk.0.attn_q.weight"].scheme == "Q4_K"
