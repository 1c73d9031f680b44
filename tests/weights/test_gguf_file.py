"""Reading GGUF files: what gguf-py wrote is read back, and nothing that is broken gets through."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffharness.errors import ArtifactFileError
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.gguf_header import parse_header
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import RawTensor, write_tensors
from tests.weights.tiny import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_tensors_are_those_that_gguf_py_reads(tiny: Path) -> None:
    reader = gguf.GGUFReader(tiny)
    with open_gguf(tiny) as file:
        assert list(file.tensors) == [t.name for t in reader.tensors]
        for t in reader.tensors:
            info = file.tensors[t.name]
            assert info.shape == tuple(int(n) for n in reversed(t.shape))
            assert (info.type, info.n_bytes) == (t.tensor_type.name, t.n_bytes)
            want = gguf.quants.dequantize(t.data, t.tensor_type).reshape(info.shape)
            assert np.array_equal(file.read(t.name), want)
            assert np.array_equal(file.raw(t.name), t.data.reshape(-1).view(np.uint8))


def test_take_reads_rows_slices_and_experts(tiny: Path) -> None:
    with open_gguf(tiny) as file:
        for name in file.tensors:
            whole = file.read(name)
            for rows in (slice(1, 3), slice(2, 2), np.array([2, 0, 2]), np.array([], dtype=np.int64)):
                taken = file.take(name, rows)
                assert taken.dtype == np.float32
                assert np.array_equal(taken, whole[rows])
        with pytest.raises(KeyError):
            file.read("blk.9.attn_q.weight")


def test_metadata_has_every_kind_of_value(tiny: Path) -> None:
    with open_gguf(tiny) as file:
        meta = file.metadata
        assert file.arch == meta["general.architecture"] == "llama"
        assert meta["llama.block_count"] == 3
        assert meta["llama.attention.layer_norm_rms_epsilon"] == float(np.float32(1e-5))
        assert meta["tokenizer.ggml.add_bos_token"] is True
        assert [meta[f"test.{k}"] for k in ("u8", "i8", "u16", "i16", "i32")] == [7, -7, 700, -700, -70000]
        assert [meta[f"test.{k}"] for k in ("u64", "i64", "f64")] == [1 << 40, -(1 << 40), 0.1]
        assert meta["general.name"] == "tiny ▁ model"
        assert meta["tokenizer.ggml.tokens"] == ["a", "b", "▁c", "dé"]
        assert meta["tokenizer.ggml.scores"] == [0.5, 1.5, -2.0, 0.0]
        assert meta["test.flags"] == [True, False, True]
        assert file.kv_types["tokenizer.ggml.tokens"] == "ARRAY[STRING]"
        assert file.kv_types["test.u16"] == "UINT16"
        assert "no.such.key" not in meta and meta.get("no.such.key", 5) == 5
        assert file.vocab_size == 4


def test_facts_about_the_file(tiny: Path) -> None:
    with open_gguf(tiny) as file:
        assert file.n_bytes == tiny.stat().st_size
        assert file.sha256() == hashlib.sha256(tiny.read_bytes()).hexdigest()
        assert file.types == {"Q8_0": 1, "Q4_0": 1, "F32": 1, "F16": 1}
        assert file.label == "tiny.gguf"


# ── split files ──────────────────────────────────────────────────────────────────────────────────


def write_shards(folder: Path, count: int = 3, total: int | None = None) -> list[Path]:
    paths = []
    for i in range(count):
        kvs = {"split.no": (i, "UINT16"), "split.count": (count, "UINT16")}
        kvs["split.tensors.count"] = (total or count, "INT32")
        encoded = {k: encode_value(k, v, t) for k, (v, t) in kvs.items()}
        if i == 0:
            encoded["general.architecture"] = encode_value("general.architecture", "llama")
        data = np.full(8, i, dtype=np.float32).view(np.uint8)
        path = folder / f"model-{i + 1:05d}-of-{count:05d}.gguf"
        write_tensors(path, encoded, [RawTensor(f"blk.{i}.attn_norm.weight", (8,), "F32", lambda data=data: [data])])
        paths.append(path)
    return paths


@pytest.mark.parametrize("given_shard", [0, 1, 2])
def test_any_shard_opens_the_whole(tmp_path: Path, given_shard: int) -> None:
    paths = write_shards(tmp_path)
    with open_gguf(paths[given_shard]) as file:
        assert file.arch == "llama"
        assert file.paths == paths
        assert [file.read(name)[0] for name in file.tensors] == [0, 1, 2]
        assert file.n_bytes == sum(p.stat().st_size for p in paths)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[1].unlink()
    with pytest.raises(ArtifactFileError, match=r"model-00002-of-00003\.gguf"):
        open_gguf(paths[0])


def test_a_renamed_shard_says_what_name_it_should_have(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    odd = paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ArtifactFileError, match="one of 3 shards"):
        open_gguf(odd)


def test_shards_of_another_model(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, total=7)
    with pytest.raises(ArtifactFileError, match="expected 7 tensors"):
        open_gguf(paths[0])
    paths = write_shards(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(ArtifactFileError, match="expected shard 2 of 3"):
        open_gguf(paths[0])


# ── bad input ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"GG", "expected the four letters GGUF"),
        (b"GGUF", "of the version"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
        (b"GGUF" + struct.pack("<I", 99), "found 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0), "tensors are announced"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 62), "metadata keys are announced"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture"),
    ],
)
def test_not_a_gguf(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtifactFileError, match=says) as caught:
        open_gguf(path)
    assert caught.value.hint


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactFileError, match="no such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(ArtifactFileError, match="is a folder"):
        open_gguf(tmp_path)


def header(kvs: bytes = b"", n_kv: int = 0, tensors: bytes = b"", n_tensors: int = 0, pad: int = 4096) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_kv) + kvs + tensors + b"\0" * pad


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str = "t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


BROKEN = {
    "key past the end": (header(struct.pack("<Q", 1 << 60), 1), "of a metadata key"),
    "empty key": (header(text("") + struct.pack("<II", 4, 1), 1), "key is empty"),
    "key twice": (header((text("a") + struct.pack("<II", 4, 1)) * 2, 2), "'a' is there twice"),
    "value type": (header(text("a") + struct.pack("<I", 13), 1), "unknown value type 13"),
    "string past the end": (header(text("a") + struct.pack("<IQ", 8, 1 << 50), 1), "found the end of the file"),
    "array past the end": (header(text("a") + struct.pack("<IIQ", 9, 10, 1 << 61), 1), "found the end of the file"),
    "array of arrays": (header(text("a") + struct.pack("<IIQ", 9, 9, 1), 1), "array of arrays"),
    "array item type": (header(text("a") + struct.pack("<IIQ", 9, 77, 1), 1), "unknown value type 77"),
    "string in array past the end": (
        header(text("a") + struct.pack("<IIQQ", 9, 8, 3, 1 << 40), 1),
        "past the end of the file",
    ),
    "last string in array past the end": (
        header(text("a") + struct.pack("<IIQQ", 9, 8, 1, 1 << 40), 1),
        "past the end of the file",
    ),
    "alignment zero": (header(text("general.alignment") + struct.pack("<II", 4, 0), 1), "power of two, found 0"),
    "alignment odd": (header(text("general.alignment") + struct.pack("<II", 4, 33), 1), "power of two, found 33"),
    "alignment type": (header(text("general.alignment") + struct.pack("<IQ", 10, 32), 1), "must be UINT32"),
    "five dimensions": (header(b"", 0, info(dims=(1, 1, 1, 1, 1)), 1), "5 dimensions"),
    "no elements": (header(b"", 0, info(dims=(32, 0)), 1), "0 elements"),
    "product overflows": (header(b"", 0, info(dims=(1 << 40, 1 << 40)), 1), "elements"),
    "unknown type": (header(b"", 0, info(kind=999), 1), "unknown type 999"),
    "half a block": (header(b"", 0, info(dims=(33,), kind=2), 1), "whole Q4_0 blocks of 32"),
    "offset not aligned": (header(b"", 0, info(offset=8), 1), "not a multiple of the alignment 32"),
    "data past the end": (header(b"", 0, info(dims=(1 << 20,)), 1), "but the file ends at"),
    "offset past the end": (header(b"", 0, info(offset=1 << 62), 1), "but the file ends at"),
    "overlapping": (header(b"", 0, info("a") + info("b", offset=96) + info("c", offset=96), 3), "overlaps"),
    "tensor twice": (header(b"", 0, info("a") + info("a", offset=128), 2), "'a' is there twice"),
    "long name": (header(b"", 0, info("n" * 64), 1), "1 to 63 bytes"),
    "name not UTF-8": (header(b"", 0, struct.pack("<Q", 2) + b"\xff\xfe", 1), "not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_refused_with_its_offset(case: str) -> None:
    data, says = BROKEN[case]
    with pytest.raises(ArtifactFileError, match=says) as caught:
        parse_header(data, "x.gguf")
    assert caught.value.offset is not None and 0 <= caught.value.offset <= len(data)


def test_every_truncation_is_an_artifact_file_error(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    with open_gguf(tiny) as file:
        last = max(file.tensor_offset(name)[1] + info.n_bytes for name, info in file.tensors.items())
    path = tmp_path / "cut.gguf"
    for length in [*range(0, last, 7), last - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactFileError):
            open_gguf(path)
    path.write_bytes(whole[:last])  # only padding is missing: nothing that anybody reads
    with open_gguf(path) as file:
        assert len(file.tensors) == 4


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_never_give_another_error_or_much_memory(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(tiny.read_bytes())
    for at in data.draw(st.lists(st.integers(0, 1400), min_size=1, max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with open_gguf(path) as file:
            dict(file.metadata)
            for name in file.tensors:
                file.read(name)
    except ArtifactFileError as error:
        assert error.message
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 << 20


def test_vocab_size_without_a_vocabulary(tmp_path: Path) -> None:
    arch = {"general.architecture": encode_value("general.architecture", "llama")}
    embedding = RawTensor("token_embd.weight", (9, 2), "F32", lambda: [np.zeros(72, dtype=np.uint8)])
    write_tensors(tmp_path / "a.gguf", arch, [embedding])
    assert GgufFile(tmp_path / "a.gguf").vocab_size == 9
    size = {"llama.vocab_size": encode_value("llama.vocab_size", 7)}
    write_tensors(tmp_path / "b.gguf", {**arch, **size}, [embedding])
    assert GgufFile(tmp_path / "b.gguf").vocab_size == 7
    write_tensors(tmp_path / "c.gguf", arch, [])
    with pytest.raises(ArtifactFileError, match=r"token_embd\.weight"):
        _ = GgufFile(tmp_path / "c.gguf").vocab_size
