"""Groups: every tensor in one group of a kind, what the options name, and sets in words."""

from __future__ import annotations

import pytest

from diffharness.errors import BadInputError
from diffharness.forensics import groups
from diffharness.forensics.groups import Group

LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "ffn_gate", "ffn_up", "ffn_down")
NAMES = [
    "token_embd.weight",
    "output_norm.weight",
    "rope_freqs.weight",
    *(f"blk.{il}.{name}.weight" for il in range(6) for name in LAYER),
    *(f"blk.{il}.layer_output_scale.weight" for il in range(6)),
    *(f"blk.{il}.attn_q.bias" for il in range(6)),
]


def labels(found: list[Group]) -> list[str]:
    return [group.label for group in found]


def covers(found: list[Group]) -> None:
    names = [name for group in found for name in group.tensors]
    assert sorted(names) == sorted(NAMES)


def test_by_class() -> None:
    found = groups.by_class(NAMES)
    covers(found)
    assert labels(found) == [
        "embedding", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "norms",
        "layer_output_scale", "rope_freqs",
    ]  # fmt: skip
    assert "blk.2.attn_q.bias" in found[1].tensors and "blk.2.attn_q_norm.weight" in found[8].tensors


def test_experts_router_and_scales_of_experts() -> None:
    names = ["blk.0.ffn_gate_inp.weight", "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.scale", "output.weight"]
    assert {g.label: len(g.tensors) for g in groups.by_class(names)} == {
        "router": 1, "experts": 1, "ffn_down_exps": 1, "output": 1,
    }  # fmt: skip


def test_by_layer_and_by_block() -> None:
    found = groups.by_layer(NAMES)
    covers(found)
    assert labels(found) == ["embedding", "rope_freqs", *(f"layer {il}" for il in range(6)), "norms"]
    found = groups.by_block(NAMES, 4)
    covers(found)
    assert labels(found) == ["embedding", "rope_freqs", "layers 0-3", "layers 4, 5", "norms"]


def test_layers_and_globs() -> None:
    found = groups.by_layers(NAMES, "0-2, 5", 6)
    assert found.layers == {0, 1, 2, 5} and found.label == "layers 0-2, 5"
    assert groups.by_layers(NAMES, "3", 6).label == "layer 3"
    assert groups.by_glob(NAMES, "blk.*.attn_q.weight").layers == set(range(6))


@pytest.mark.parametrize("text", ["6", "2-1", "a", "", "-1", "0-", "0-6"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(BadInputError, match="expected layers from 0 to 5"):
        groups.by_layers(NAMES, text, 6)


def test_a_glob_that_fits_nothing() -> None:
    with pytest.raises(BadInputError, match=r"fit 'blk\.\*\.attn_q', found none"):
        groups.by_glob(NAMES, "blk.*.attn_q")


def test_halves_end_at_single_layers_and_cover_the_group() -> None:
    whole = groups.by_class(NAMES)[1]
    parts, todo = list[Group](), [whole]
    while todo:
        group = todo.pop()
        cut = groups.halves(group)
        (parts if len(cut) == 1 else todo).extend(cut)
    assert sorted(name for part in parts for name in part.tensors) == sorted(whole.tensors)
    assert sorted(labels(parts)) == [f"attn_q, layer {il}" for il in range(6)]
    embedding = groups.by_class(NAMES)[0]
    assert groups.halves(embedding) == [embedding]
    assert groups.halves(Group("key", keys=frozenset({"key"})))[0].keys == {"key"}


def test_joined_and_limited() -> None:
    both = groups.joined([*groups.by_layer(NAMES), *groups.of_keys(["llama.rope.freq_base"])])
    assert both.tensors == set(NAMES) and both.keys == {"llama.rope.freq_base"}
    found = groups.limited([*groups.by_layer(NAMES), *groups.of_keys(["k"])], {"blk.3.attn_q.weight"})
    assert labels(found) == ["layer 3", "k"]


def test_in_words() -> None:
    kinds = ["sliding", "sliding", "global"] * 2
    chosen = [
        groups.by_glob(NAMES, "blk.*.layer_output_scale.weight"),
        groups.by_glob(NAMES, "blk.[25].ffn_down.weight"),
        groups.by_glob(NAMES, "blk.[25].ffn_up.weight"),
        Group("", frozenset({"token_embd.weight"})),
        *groups.of_keys(["gemma4.rope.freq_base"]),
    ]
    assert groups.in_words(chosen, kinds, NAMES) == (
        "embedding; ffn_up, ffn_down in only global layers (2, 5); layer_output_scale in all layers; "
        "gemma4.rope.freq_base"
    )
    assert groups.in_words([], kinds, NAMES) == "nothing"
    only_sliding = [name for name in NAMES if not name.startswith(("blk.2.attn_v", "blk.5.attn_v"))]
    values = groups.by_glob(only_sliding, "*attn_v*")
    assert groups.in_words([values], kinds, only_sliding) == "attn_v in every layer that has it (0, 1, 3, 4)"
