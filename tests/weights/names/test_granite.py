"""Granite 4: one class of transformers, three architectures of GGUF."""

from __future__ import annotations

from typing import Any

import pytest

from diffharness.errors import ArtifactFileError, CheckpointError, UnsupportedError
from diffharness.weights import names
from diffharness.weights.names._keys import Keys
from diffharness.weights.synth import SynthSource

ATTENTION, MIXER = "full_attention", "linear_attention"


def granite_4(**changes: Any) -> dict[str, Any]:
    return SynthSource("granitehybrid").config | {"position_embedding_type": "rope"} | changes


@pytest.mark.parametrize(
    ("kinds", "n_expert", "arch"),
    [
        ([ATTENTION] * 4, 0, "granite"),
        (["attention"] * 4, 0, "granite"),  # as published configs spell it
        ([ATTENTION] * 4, 6, "granitemoe"),
        ([ATTENTION, MIXER] * 2, 0, "granitehybrid"),
        ([MIXER] * 4, 6, "granitehybrid"),
        (None, 6, "granitehybrid"),
    ],
)
def test_its_layers_and_experts_tell_which(kinds: list[str] | None, n_expert: int, arch: str) -> None:
    config = granite_4(layer_types=kinds, num_local_experts=n_expert, intermediate_size=96)
    found = names.for_config(config)
    assert found.arch == arch
    assert found.metadata(config)["general.architecture"] == arch


def test_without_experts_the_feed_forward_is_as_wide_as_the_shared_mlp() -> None:
    dense = granite_4(
        layer_types=[ATTENTION] * 4, num_local_experts=0, intermediate_size=8, shared_intermediate_size=80
    )
    assert names.for_arch("granite").metadata(dense)["granite.feed_forward_length"] == 80


@pytest.mark.parametrize("kind", ["nope", None])
def test_no_rotary_embedding_is_said_or_refused(kind: str | None) -> None:
    config = granite_4(layer_types=[ATTENTION] * 4, num_local_experts=0, position_embedding_type=kind)
    assert names.for_config(config).metadata(config)["granite.rope.scaling.finetuned"] is False
    config["num_local_experts"] = 6
    with pytest.raises(CheckpointError, match="position_embedding_type"):
        names.for_config(config).metadata(config)


@pytest.mark.parametrize("kinds", [[ATTENTION] * 3, [ATTENTION, "sliding_attention"] * 2])
def test_layers_of_no_known_kind_are_refused(kinds: list[str]) -> None:
    with pytest.raises(CheckpointError, match="layer_types"):
        names.for_config(granite_4(layer_types=kinds))


def test_what_a_file_repeats_for_every_layer_holds_for_all() -> None:
    """As the engine's converter writes the KV heads of these models."""
    file = {"general.architecture": "granite", "granite.block_count": 3, "granite.attention.head_count": 4}
    assert Keys(file | {"granite.attention.head_count_kv": [2, 2, 2]}).n_head_kv == 2
    with pytest.raises(UnsupportedError, match="differs by layer"):
        assert Keys(file | {"granite.attention.head_count_kv": [2, 2, 1]}).n_head_kv
    for senseless in ([2, 2], [], ["two"] * 3, [[2]] * 3):
        with pytest.raises(ArtifactFileError, match="head_count_kv"):
            assert Keys(file | {"granite.attention.head_count_kv": senseless}).n_head_kv
