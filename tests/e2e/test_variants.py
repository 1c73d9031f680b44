"""Clean pairs stay clean in other shapes: split files, several chunks, other precisions and batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffharness.fixture import from_ids, load_fixture, save_fixture
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import RawTensor, write_tensors
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.runs import NATIVE, whole_run


def split(pair: Pair, folder: Path, count: int) -> Path:
    """The pair's artifact in `count` shards, all keys in the first; the path of the second."""
    folder.mkdir()
    with open_gguf(pair.gguf) as source:
        names = list(source.tensors)
        for number in range(count):
            kvs = source.kv_raw() if number == 0 else {}
            kvs["split.no"] = encode_value("split.no", number, "UINT16")
            kvs["split.count"] = encode_value("split.count", count, "UINT16")
            kvs["split.tensors.count"] = encode_value("split.tensors.count", len(names), "INT32")
            tensors = [
                RawTensor(info.name, info.shape, info.type, lambda name=info.name: [source.raw(name)])  # type: ignore[misc]
                for info in (source.tensors[name] for name in names[number::count])
            ]
            write_tensors(folder / f"model-{number + 1:05d}-of-{count:05d}.gguf", kvs, tensors, source.alignment)
    return folder / f"model-00002-of-{count:05d}.gguf"


def test_a_split_file_is_one_artifact(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("qwen3", "Q8_0")
    record = whole_run(replace(pair, gguf=split(pair, tmp_path / "split", 3)), with_checkpoint=True)
    assert record.verdict.primary == "agree", (record.verdict, [f.message for f in record.findings])
    with open_gguf(pair.gguf) as whole:
        assert record.subject.artifact.n_tensors == len(whole.tensors)
        assert record.subject.artifact.types == whole.types


@pytest.mark.parametrize("case", ["llama-llama3", "gemma3", "gemma4-e", "qwen3moe"])
def test_several_chunks_small_batches_and_float64(make_pair: MakePair, tmp_path: Path, case: str) -> None:
    pair = make_pair(case)
    ids = load_fixture(pair.fixture).ids
    fixture = tmp_path / "chunks.json"
    save_fixture(from_ids([*ids, *ids[:37]], chunk=48, bos_id=1), fixture)  # 48 + 48 + 21 tokens
    engine = NATIVE.changed(n_batch=32, n_ubatch=16)
    record = whole_run(replace(pair, fixture=fixture), engine=engine, dtype="float64", with_checkpoint=True)
    assert record.verdict.primary == "agree", (record.verdict, [f.message for f in record.findings])
    assert record.subject.fixture is not None and record.subject.fixture.n_tokens == 117
    assert record.subject.fixture.n_scored == 23 + 23 + 10
    landmarks = {row.start for row in record.legs.graph.per_position}
    assert 16 in landmarks, "the end of the first ubatch is a place to look at"
