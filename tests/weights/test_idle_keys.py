"""Keys for a synthetic config.json that change nothing are found, and only those."""

from __future__ import annotations

import pytest

from diffharness.weights import names
from diffharness.weights.idle_keys import idle_keys, nearest_to
from diffharness.weights.names._map import Sizes


@pytest.mark.parametrize("arch", sorted(names.MAPS))
def test_of_every_architecture(arch: str) -> None:
    own = names.for_arch(arch).example(Sizes())
    assert idle_keys(arch, Sizes(), own) == []
    assert idle_keys(arch, Sizes(), own | {"no_such_key": 3}) == ["no_such_key"]


def test_a_key_that_the_example_lacks_is_not_idle_for_having_its_default() -> None:
    assert "sliding_window" not in names.for_arch("llama").example(Sizes())
    for value in (None, 16):
        assert idle_keys("llama", Sizes(), {"sliding_window": value}) == []
    assert idle_keys("llama", Sizes(), {"rope_scaling": None}) == []


def test_keys_that_matter_only_together() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    assert idle_keys("llama", Sizes(), experts) == []
    assert idle_keys("llama", Sizes(), {"num_experts_per_tok": 2}) == ["num_experts_per_tok"]


def test_the_nearest_key() -> None:
    assert nearest_to("rms_norm_epz", "llama", Sizes()) == "rms_norm_eps"
    assert nearest_to("gizmo", "llama", Sizes()) is None
