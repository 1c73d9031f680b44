"""Writing GGUF files: exact metadata, exact rounding, and nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffharness.errors import OutputError
from diffharness.weights import gguf_write
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import (
    RawTensor,
    encode_floats,
    rewrite_gguf,
    write_gguf,
    write_tensors,
)
from diffharness.weights.source import TensorInfo
from tests.weights.tiny import MemorySource, write_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> GgufFile:
    return open_gguf(write_tiny(tmp_path / "tiny.gguf"))


def test_a_strict_file_has_the_same_values_and_metadata(tiny: GgufFile, tmp_path: Path) -> None:
    write_gguf(tmp_path / "strict.gguf", tiny, type_of=lambda info: "F32", kv_from=tiny)
    with open_gguf(tmp_path / "strict.gguf") as strict:
        assert strict.types == {"F32": 4}
        assert list(strict.tensors) == list(tiny.tensors)
        for name in tiny.tensors:
            assert np.array_equal(strict.read(name), tiny.read(name))
        changed = {k for k in {*strict.kv_raw(), *tiny.kv_raw()} if strict.kv_raw().get(k) != tiny.kv_raw().get(k)}
        assert changed == {"general.file_type"}
        assert strict.metadata["general.file_type"] == 0


def test_gguf_py_reads_what_is_written(tiny: GgufFile, tmp_path: Path) -> None:
    write_gguf(tmp_path / "strict.gguf", tiny, type_of=lambda info: "BF16", kv_from=tiny)
    reader = gguf.GGUFReader(tmp_path / "strict.gguf")
    for t in reader.tensors:
        want = tiny.read(t.name)
        if want.ndim > 1:
            want = gguf.quants.dequantize(
                gguf.quants.quantize(want, gguf.GGMLQuantizationType.BF16), gguf.GGMLQuantizationType.BF16
            )
        got = gguf.quants.dequantize(t.data, t.tensor_type).reshape(want.shape)
        assert np.array_equal(got, want)
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "b", "▁c", "dé"]


def test_types_that_stay_are_copied_and_vectors_stay_f32(tiny: GgufFile, tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "mixed.gguf", tiny, type_of=lambda info: info.type if info.type == "Q4_0" else "F16", kv_from=tiny
    )
    with open_gguf(tmp_path / "mixed.gguf") as mixed:
        assert np.array_equal(mixed.raw("blk.0.attn_q.weight"), tiny.raw("blk.0.attn_q.weight"))
        assert mixed.tensors["blk.0.attn_norm.weight"].type == "F32"
        assert mixed.tensors["token_embd.weight"].type == "F16"
        assert "general.file_type" not in mixed.metadata  # nothing single is true of a mixture


def test_a_source_without_a_file_writes_its_own_metadata(tmp_path: Path) -> None:
    arrays = {
        "token_embd.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "blk.0.ffn_gate_inp.weight": np.ones((2, 4), dtype=np.float32),
    }
    source = MemorySource("llama", {"llama.block_count": 1, "llama.rope.freq_base": 10000}, arrays)
    write_gguf(
        tmp_path / "a.gguf",
        source,
        type_of=lambda info: "F16",
        extra_metadata={"general.architecture": "llama", "llama.block_count": 2},
    )
    with open_gguf(tmp_path / "a.gguf") as file:
        assert next(iter(file.metadata)) == "general.architecture"
        assert file.metadata["llama.block_count"] == 2
        assert file.kv_types["llama.rope.freq_base"] == "FLOAT32"  # though it was given as an integer
        assert file.metadata["general.file_type"] == 1
        assert file.tensors["blk.0.ffn_gate_inp.weight"].type == "F32"  # the router
        assert np.array_equal(file.read("token_embd.weight"), arrays["token_embd.weight"])


def test_large_tensors_are_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_write, "_CHUNK", 50)
    values = np.random.default_rng(0).standard_normal((37, 12)).astype(np.float32)
    source = MemorySource("llama", {"general.architecture": "llama"}, {"output.weight": values})
    pieces = list(gguf_write.chunks_of_rows(source, source.tensors["output.weight"]))
    assert [len(piece) for piece in pieces] == [4] * 9 + [1]
    write_gguf(tmp_path / "a.gguf", source, type_of=lambda info: "F32")
    with open_gguf(tmp_path / "a.gguf") as file:
        assert np.array_equal(file.read("output.weight"), values)


def test_split_files_become_one(tmp_path: Path) -> None:
    kvs = {"general.architecture": "llama", "split.count": 1, "split.no": 0, "split.tensors.count": 1}
    data = np.ones(8, dtype=np.float32)
    write_tensors(
        tmp_path / "a.gguf",
        {k: encode_value(k, v) for k, v in kvs.items()},
        [RawTensor("output_norm.weight", (8,), "F32", lambda: [data.view(np.uint8)])],
    )
    with open_gguf(tmp_path / "a.gguf") as file:
        write_gguf(tmp_path / "b.gguf", file, type_of=lambda info: "F32", kv_from=file)
    with open_gguf(tmp_path / "b.gguf") as file:
        assert not [key for key in file.metadata if key.startswith("split.")]


# ── values ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "value", "kind", "back"),
    [
        ("a.b", True, "BOOL", True),
        ("a.b", 5, "UINT32", 5),
        ("a.b", -5, "INT32", -5),
        ("a.b", 1 << 40, "UINT64", 1 << 40),
        ("a.b", -(1 << 40), "INT64", -(1 << 40)),
        ("a.b", 0.5, "FLOAT32", 0.5),
        ("a.b", "é", "STRING", "é"),
        ("a.b", "", "STRING", ""),
        ("a.b", [], "ARRAY[INT32]", []),
        ("a.b", [1, -2], "ARRAY[INT32]", [1, -2]),
        ("a.b", [True, False], "ARRAY[BOOL]", [True, False]),
        ("a.b", [1, 0.5], "ARRAY[FLOAT32]", [1.0, 0.5]),
        ("a.b", ["x", ""], "ARRAY[STRING]", ["x", ""]),
        ("a.b", np.array([3, 4]), "ARRAY[INT32]", [3, 4]),
        ("a.b", np.float32(0.25), "FLOAT32", 0.25),
        ("llama.rope.freq_base", 10000, "FLOAT32", 10000.0),
        ("gemma2.attn_logit_softcapping", 50, "FLOAT32", 50.0),
    ],
)
def test_values_of_every_type(tmp_path: Path, key: str, value: object, kind: str, back: object) -> None:
    kvs = {"general.architecture": encode_value("general.architecture", "x"), key: encode_value(key, value)}
    write_tensors(tmp_path / "a.gguf", kvs, [])
    with open_gguf(tmp_path / "a.gguf") as file:
        assert file.kv_types[key] == kind
        assert file.metadata[key] == back
    assert gguf.GGUFReader(tmp_path / "a.gguf").get_field(key) is not None


def test_values_that_gguf_has_not() -> None:
    with pytest.raises(TypeError, match=r"a\.b: a GGUF value cannot be a dict"):
        encode_value("a.b", {})
    with pytest.raises(TypeError, match="of one type"):
        encode_value("a.b", ["x", 1])


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
@settings(deadline=None)
def test_floats_are_rounded_as_gguf_py_does(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    for type_name in ("F32", "F16", "BF16"):
        kind = gguf.GGMLQuantizationType[type_name]
        with np.errstate(all="ignore"):
            want = gguf.quants.quantize(array, kind).view(np.uint8)
        assert np.array_equal(encode_floats(array, type_name), want)


def test_bf16_ties_go_to_even() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF800000], dtype=np.uint32).view(np.float32)
    assert list(gguf_write.to_bf16(ties)) == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80]


# ── changed copies ───────────────────────────────────────────────────────────────────────────────


def test_a_copy_without_changes_is_equal(tiny: GgufFile, tmp_path: Path) -> None:
    rewrite_gguf(tiny, tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == tiny.path.read_bytes()


def test_tensors_and_keys_can_be_changed_added_and_removed(tiny: GgufFile, tmp_path: Path) -> None:
    def zeroed(info: TensorInfo, raw: np.ndarray) -> tuple[str, tuple[int, ...], np.ndarray] | None:
        return (info.type, info.shape, np.zeros_like(raw)) if info.name == "blk.0.attn_q.weight" else None

    rewrite_gguf(
        tiny,
        tmp_path / "copy.gguf",
        tensor=zeroed,
        kv={"llama.block_count": 5, "test.u8": None, "test.new": "x", "test.f64": 3},
        without=["blk.0.attn_norm.weight"],
    )
    with open_gguf(tmp_path / "copy.gguf") as copy:
        assert not copy.read("blk.0.attn_q.weight").any()
        assert np.array_equal(copy.raw("token_embd.weight"), tiny.raw("token_embd.weight"))
        assert "blk.0.attn_norm.weight" not in copy.tensors
        assert copy.metadata["llama.block_count"] == 5 and copy.metadata["test.new"] == "x"
        assert "test.u8" not in copy.metadata
        assert copy.kv_types["test.f64"] == "FLOAT64" and copy.metadata["test.f64"] == 3.0


# ── output ───────────────────────────────────────────────────────────────────────────────────────


def assert_nothing_left(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["tiny.gguf"]


def test_too_little_space_is_told_before_anything_is_written(
    tiny: GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(OutputError, match="must be free to write"):
        write_gguf(tmp_path / "out.gguf", tiny, type_of=lambda info: "F32", kv_from=tiny)
    assert_nothing_left(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing_behind(tiny: GgufFile, tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "from diffharness.weights.gguf_file import open_gguf\n"
        "from diffharness.weights.gguf_write import write_gguf\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "f = open_gguf(sys.argv[1])\n"
        "from diffharness.errors import OutputError\n"
        "try:\n"
        "    write_gguf(sys.argv[2], f, type_of=lambda i: 'F32', kv_from=f)\n"
        "except OutputError as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny.path), str(tmp_path / "out.gguf")], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "out.gguf: File too large" in done.stdout
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_leaves_nothing_behind(
    tiny: GgufFile, tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(values: np.ndarray, type_name: str) -> np.ndarray:
        raise error

    monkeypatch.setattr(gguf_write, "encode_floats", stop)
    with pytest.raises(error):
        write_gguf(tmp_path / "out.gguf", tiny, type_of=lambda info: "F32", kv_from=tiny)
    assert_nothing_left(tmp_path)


def test_a_folder_that_is_not_there(tiny: GgufFile, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_gguf(tmp_path / "no" / "out.gguf", tiny, type_of=lambda info: "F32", kv_from=tiny)


def test_data_of_the_wrong_size_is_not_written(tmp_path: Path) -> None:
    short = RawTensor("a.weight", (8,), "F32", lambda: [np.zeros(4, dtype=np.uint8)])
    with pytest.raises(OutputError, match="expected 32 bytes, got 4"):
        write_tensors(tmp_path / "a.gguf", {}, [short])
    assert not list(tmp_path.iterdir())
