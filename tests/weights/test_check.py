"""Tensors that are missing, extra, misshapen or not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffharness.errors import ArtifactFileError
from diffharness.weights import names
from diffharness.weights.check import NonFinite, check_against, check_model, non_finite
from diffharness.weights.dequant import BLOCKS, SCALES
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import RawTensor, write_tensors
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


def test_the_rules_are_those_of_the_source_itself(source: MemorySource) -> None:
    assert check_model(source) == []
    source.arch = "rwkv7"
    with pytest.raises(ArtifactFileError, match="rwkv7"):
        check_model(source)


HOSTILE = ["x", -1, 0, 1 << 31, 1 << 60, float("nan"), [], [1, 2], ["x"], [-1] * 9, True, b"x"]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("arch", sorted(names.MAPS))
def test_hostile_metadata_is_an_artifact_file_error(arch: str, value: object) -> None:
    keys = ["block_count", "embedding_length", "feed_forward_length", "expert_count", "vocab_size"]
    keys += ["attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.sliding_window"]
    for key in keys:
        metadata = {f"{arch}.{k}": 4 for k in keys} | {f"{arch}.{key}": value}
        with pytest.raises(ArtifactFileError):
            check_model(MemorySource(arch, metadata, {}))


def test_nan_and_infinity_are_counted_and_located(source: MemorySource) -> None:
    source.arrays["blk.1.ffn_up.weight"][3, 5] = np.nan
    source.arrays["blk.1.ffn_up.weight"][40, 1] = -np.inf
    source.arrays["output_norm.weight"][9] = np.inf
    assert sorted(non_finite(source), key=lambda found: found.tensor) == [
        NonFinite("blk.1.ffn_up.weight", 2, 3 * 64 + 5),
        NonFinite("output_norm.weight", 1, 9),
    ]


@pytest.mark.parametrize("type_name", SCALES)
def test_quantized_tensors_are_judged_by_their_scales(tmp_path: Path, type_name: str) -> None:
    block, size = BLOCKS[type_name]
    raw = np.random.default_rng(8).integers(0, 256, (6, size), dtype=np.uint8)
    for at in SCALES[type_name]:
        raw[:, at : at + 2] = np.full((6, 1), 0.125, dtype=np.float16).view(np.uint8)
    kvs = {"general.architecture": encode_value("general.architecture", "llama")}
    tensor = RawTensor("a.weight", (6, block), type_name, lambda: [raw])
    write_tensors(tmp_path / "sound.gguf", kvs, [tensor])
    assert non_finite(open_gguf(tmp_path / "sound.gguf")) == []
    for at in SCALES[type_name]:
        for value in (np.nan, np.inf, -np.inf):
            damaged = raw.copy()
            damaged[4, at : at + 2] = np.array([value], dtype=np.float16).view(np.uint8)
            tensor = RawTensor("a.weight", (6, block), type_name, lambda damaged=damaged: [damaged])
            write_tensors(tmp_path / "damaged.gguf", kvs, [tensor])
            with open_gguf(tmp_path / "damaged.gguf") as file:
                bad = ~np.isfinite(file.read("a.weight")).reshape(-1)
                assert bad.any()
                assert non_finite(file) == [NonFinite("a.weight", int(bad.sum()), int(bad.argmax()))]


def test_the_first_is_located_across_chunks(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffharness.weights.gguf_write._CHUNK", 500)
    source.arrays["blk.1.ffn_up.weight"][80:90] = np.nan
    assert non_finite(source) == [NonFinite("blk.1.ffn_up.weight", 640, 80 * 64)]
