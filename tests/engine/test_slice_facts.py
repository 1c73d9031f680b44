"""configs/slices.yaml: what is known of llama.cpp, read strictly."""

from __future__ import annotations

import math

import gguf
import pytest
from pydantic import ValidationError

from diffharness.engine.slice_facts import Architecture, SliceFacts, facts

NEWER = {"minimax-01"}  # in llama.cpp, not yet in the gguf package


def unknown(known: SliceFacts) -> set[str]:
    return known.architectures.keys() - set(gguf.MODEL_ARCH_NAMES.values()) - NEWER


def test_every_architecture_is_one_of_llama_cpps() -> None:
    assert not unknown(facts())
    slip = facts().model_copy(update={"architectures": {"gema2": Architecture()}})
    assert unknown(slip) == {"gema2"}


def test_a_key_is_one_thing() -> None:
    known = facts()
    kinds = [known.by_layer, known.whole, known.leading, known.ties.keys()]
    assert sum(map(len, kinds)) == len(set().union(*kinds))


def test_what_is_known_of_one_architecture() -> None:
    gemma2, plain = facts().of("gemma2"), facts().of("llama")
    assert gemma2.is_told_by(46) and not gemma2.is_told_by(45) and gemma2.factor(64) == 8
    assert plain == Architecture() and not plain.is_told_by(32) and plain.factor(64) == 1
    assert facts().of("baichuan").is_told_by(3), "any number may be another model"
    by_depth = facts().of("minicpm").by_depth
    assert by_depth is not None and math.isclose(by_depth.value(49), 0.2)


@pytest.mark.parametrize("wrong", [{"least": 2}, {"input_factor": "half"}, {"told_by_depth": "some"}])
def test_a_slip_is_an_error(wrong: dict[str, object]) -> None:
    whole = facts().model_dump()
    SliceFacts.model_validate(whole)
    with pytest.raises(ValidationError):
        SliceFacts.model_validate({**whole, "architectures": {"llama": wrong}})
