"""Hyperparameters: kinds, defaults, per-layer values, rope scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest

from diffharness.errors import ArtifactFileError
from diffharness.reference import archs
from diffharness.reference.archs.llama import Llama
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.ops import NO_SCALING, RopeScaling
from tests.reference.random_source import LLAMA


def parameters(**values: Any) -> HyperParameters:
    changed = {f"llama.{key.replace('__', '.')}": value for key, value in values.items()}
    return HyperParameters({"general.architecture": "llama", **changed})


def test_kinds_and_defaults() -> None:
    hp = parameters(a=3, b=2.5, c="x", d=True)
    assert (hp.integer("a"), hp.number("a"), hp.number("b")) == (3, 3.0, 2.5)
    assert (hp.string("c"), hp.boolean("d")) == ("x", True)
    assert (hp.integer("z", 7), hp.number("z", 0.5)) == (7, 0.5)
    assert (hp.string("z", "s"), hp.boolean("z", False)) == ("s", False)
    assert hp.has("a") and not hp.has("z")


WRONG = [("integer", 2.5), ("integer", True), ("number", "x"), ("number", math.inf)]


@pytest.mark.parametrize(("read", "value"), WRONG)
def test_wrong_kinds_name_the_key_and_the_value(read: str, value: Any) -> None:
    with pytest.raises(ArtifactFileError, match=r"llama\.a.*expected.*found"):
        getattr(parameters(a=value), read)("a")


def test_one_value_stands_for_all_layers() -> None:
    assert parameters(a=4).integers("a", 3) == (4, 4, 4)
    assert parameters(a=[4, 2, 1]).integers("a", 3) == (4, 2, 1)
    assert parameters().booleans("a", 2, True) == (True, True)
    for wrong in ([4, 2], [4, 2, "x"], "four"):
        with pytest.raises(ArtifactFileError, match=r"llama\.a"):
            parameters(a=wrong).integers("a", 3)


def test_windows_by_pattern() -> None:
    assert parameters().windows(2) == (None, None)
    assert parameters(attention__sliding_window=8).windows(2) == (8, 8)
    pattern = {"attention__sliding_window": 8, "attention__sliding_window_pattern": [True, False]}
    assert parameters(**pattern).windows(2) == (8, None)


def test_rope_scaling_kinds() -> None:
    assert parameters().rope_scaling() == NO_SCALING
    assert parameters(rope__scaling__type="none", rope__scaling__factor=4.0).rope_scaling() == NO_SCALING
    linear = RopeScaling(freq_scale=0.25)
    assert parameters(rope__scaling__type="linear", rope__scaling__factor=4.0).rope_scaling() == linear
    assert parameters(rope__scale_linear=4.0).rope_scaling() == linear  # the key of old files
    with pytest.raises(ArtifactFileError, match="longrope"):
        parameters(rope__scaling__type="longrope").rope_scaling()


def test_yarn() -> None:
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "context_length": 64}
    found = parameters(**yarn).rope_scaling()
    assert found == RopeScaling(0.25, 1.0, 1 + 0.1 * math.log(4), 32.0, 1.0, 64)
    stated = yarn | {"rope__scaling__yarn_attn_factor": 1.5, "rope__scaling__original_context_length": 16}
    assert (parameters(**stated).rope_scaling().magnitude, parameters(**stated).rope_scaling().n_ctx_orig) == (1.5, 16)
    multiplied = parameters(**yarn, rope__scaling__attn_factor=2.0).rope_scaling()
    assert multiplied.magnitude == pytest.approx(2 * found.magnitude)


def test_llama_defaults() -> None:
    model = archs.build({key: value for key, value in LLAMA.items() if "key_length" not in key and "rope" not in key})
    assert isinstance(model, Llama)
    assert (model.head_dim, model.n_rot, model.rope_base) == (6, 6, 10000.0)
    assert model.attn_scale == pytest.approx(6**-0.5)
    assert model.layer_kind(0) == "global" and not model.uses_gelu
    assert model.n_expert == 0


@pytest.mark.parametrize("kv", [0, 3, 8])
def test_heads_must_fit(kv: int) -> None:
    with pytest.raises(ArtifactFileError, match="head_count_kv"):
        archs.build(LLAMA | {"llama.attention.head_count_kv": kv})
