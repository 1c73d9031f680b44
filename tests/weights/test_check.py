"""Tensors that are missing, extra, misshapen or not finite."""

from __future__ import annotations

import numpy as np
import pytest

from diffharness.errors import ArtifactFileError
from diffharness.weights import names
from diffharness.weights.check import NonFinite, check_against, non_finite
from diffharness.weights.names._keys import TIED_HEAD
from diffharness.weights.source import TensorInfo
from tests.weights.tiny import LLAMA_CONFIG, MemorySource, random_source


@pytest.fixture
def source() -> MemorySource:
    return random_source(LLAMA_CONFIG)


def check(source: MemorySource) -> list[str]:
    return check_against(source, names.for_arch(source.arch).rules(source.metadata))


def test_a_sound_model(source: MemorySource) -> None:
    assert check(source) == []
    assert non_finite(source) == []


def test_extra_tensors_are_told(source: MemorySource) -> None:
    source.tensors["blk.0.surprise.weight"] = TensorInfo("blk.0.surprise.weight", (1,), "F32", 4)
    assert check(source) == ["blk.0.surprise.weight"]


def test_missing_tensors_are_counted_and_named(source: MemorySource) -> None:
    for name in ("blk.1.attn_q.weight", "blk.1.ffn_norm.weight"):
        del source.tensors[name]
    with pytest.raises(ArtifactFileError, match=r"2 tensors of a llama model are missing: blk\.1\.attn_q\.weight"):
        check(source)


def test_an_optional_tensor_may_be_missing(source: MemorySource) -> None:
    del source.tensors["output.weight"]
    source.metadata = {k: v for k, v in source.metadata.items() if k != TIED_HEAD}  # a file from elsewhere
    assert check(source) == []


def test_a_misshapen_tensor_is_named_with_both_shapes(source: MemorySource) -> None:
    name = "blk.0.ffn_up.weight"
    source.tensors[name] = TensorInfo(name, (96, 32), "F32", 4 * 96 * 32)
    with pytest.raises(ArtifactFileError, match=r"ffn_up\.weight: expected \(96, 64\), found \(96, 32\)") as caught:
        check(source)
    assert caught.value.tensor == name


def test_nan_and_infinity_are_counted_and_located(source: MemorySource) -> None:
    source.arrays["blk.1.ffn_up.weight"][3, 5] = np.nan
    source.arrays["blk.1.ffn_up.weight"][40, 1] = -np.inf
    source.arrays["output_norm.weight"][9] = np.inf
    assert sorted(non_finite(source), key=lambda found: found.tensor) == [
        NonFinite("blk.1.ffn_up.weight", 2, 3 * 64 + 5),
        NonFinite("output_norm.weight", 1, 9),
    ]


def test_the_first_is_located_across_chunks(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffharness.weights.gguf_write._CHUNK", 500)
    source.arrays["blk.1.ffn_up.weight"][80:90] = np.nan
    assert non_finite(source) == [NonFinite("blk.1.ffn_up.weight", 640, 80 * 64)]
