"""`inspect` on whole files: clean ones agree, each planted fault is named with its tensors, no forward is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness.engine.runner import Engine
from diffharness.errors import CheckpointError
from diffharness.pipeline.inspecting import InspectRequest, inspect
from diffharness.records.inspect import InspectRecord
from diffharness.report.document import to_markdown, to_text
from diffharness.report.inspect import document
from diffharness.settings import load_tolerances
from diffharness.verdict import exit_code
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import encode_floats, rewrite_gguf
from tests.e2e import issue_6056
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.runs import NATIVE, whole_run
from tests.e2e.test_planted_artifact import bytes_damaged, damaged, rekeyed, shuffle_rows, with_nan


def inspected(pair: Pair, **changes: Any) -> InspectRecord:
    request = InspectRequest(pair.gguf, pair.checkpoint, engine=NATIVE, tolerances=load_tolerances())
    record = inspect(replace(request, **changes))
    assert max(map(len, to_text(document(record)).splitlines()[:-2]), default=0) <= 100 or record.verdict.next_step
    assert InspectRecord.model_validate(json.loads(record.to_json())) == record
    return record


def drifted(record: InspectRecord) -> list[str]:
    return [t.name for t in record.tensors if t.drifted]


@pytest.mark.parametrize(
    ("case", "type_name"),
    [
        ("llama", "F32"), ("llama", "BF16"), ("llama", "Q4_0"), ("qwen3", "Q8_0"), ("gemma4", "Q4_K"),
        ("gemma3", "Q2_K"), ("mixtral", "Q6_K"), ("gemma2", "F16"),
    ],
)  # fmt: skip
def test_a_clean_file_agrees(make_pair: MakePair, case: str, type_name: str) -> None:
    record = inspected(make_pair(case, type_name))
    assert record.verdict.primary == "agree", record.verdict
    assert (drifted(record), record.patterns, exit_code(record.verdict)) == ([], [], 0)
    assert all(t.artifact is not None and t.control is not None for t in record.tensors)
    assert record.totals.compared == len(record.tensors) and "no forward was run" in record.verdict.summary
    assert [row.key for row in record.metadata if row.used] == []


# case, tensors, what is done to them
FAULTS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("llama", "blk.1.ffn_down.weight", shuffle_rows),
    ("llama", "blk.2.attn_q.weight", lambda v: v * np.float32(1.3)),
    ("qwen3", "blk.1.attn_q_norm.weight", lambda v: v - 1),
    ("gemma3", "blk.*.attn_norm.weight", lambda v: v - 1),
    ("gemma4", "blk.*.layer_output_scale.weight", lambda v: np.ones_like(v)),
    ("gemma4", "token_embd.weight", lambda v: v * np.float32(0.8)),
    ("mixtral", "blk.0.ffn_up_exps.weight", lambda v: v[::-1].copy()),
]


@pytest.mark.parametrize(("case", "pattern", "change"), FAULTS, ids=[f"{case}-{name}" for case, name, _ in FAULTS])
def test_damage_is_found_where_it_is(
    make_pair: MakePair, tmp_path: Path, case: str, pattern: str, change: Callable[[Any], Any]
) -> None:
    pair = damaged(make_pair(case, "Q8_0"), tmp_path / "damaged.gguf", pattern, change)
    record = inspected(pair)
    assert record.verdict.all == ["artifact.weights"], record.verdict
    names = [name for name in (t.name for t in record.tensors) if fnmatchcase(name, pattern)]
    assert drifted(record) == names and record.totals.drifted == len(names)
    assert {name for row in record.patterns for name in row.tensors} == set(names)
    assert record.verdict.next_step is not None and record.verdict.next_step.startswith("diffharness restore ")


def test_nan_is_a_matter_of_the_file(make_pair: MakePair, tmp_path: Path) -> None:
    pair = damaged(make_pair("qwen2", "Q8_0"), tmp_path / "nan.gguf", "blk.1.ffn_up.weight", with_nan)
    record = inspected(pair)
    assert record.verdict.all == ["artifact.file"] and exit_code(record.verdict, record.findings) == 1
    (row,) = [t for t in record.tensors if t.nan]
    assert (row.name, row.nan, row.drifted) == ("blk.1.ffn_up.weight", 32, True)


def test_blocks_of_zeros_of_an_expert(make_pair: MakePair, tmp_path: Path) -> None:
    def zero(data: Any) -> None:
        data[len(data) // 2 : len(data) // 2 + 34 * 2] = 0  # two blocks of Q8_0, in the middle of the stack

    pair = make_pair("mixtral", "Q8_0")
    name = "blk.0.ffn_up_exps.weight"
    record = inspected(bytes_damaged(pair, tmp_path / "zeros.gguf", name, zero))
    (row,) = [t for t in record.tensors if t.drifted]
    assert (row.name, row.zero_blocks, row.zero_experts) == (name, 2, [row.shape[0] // 2])
    assert record.verdict.all == ["artifact.weights"]


def test_keys_with_both_values(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("llama", "Q8_0")
    changed = rekeyed(
        pair, tmp_path / "rekeyed.gguf", llama__rope__freq_base=2e4, llama__context_length=77, llama__made_up=1
    )
    record = inspected(changed)
    assert record.verdict.all == ["artifact.metadata"]
    rows = {row.key: (row.artifact, row.used) for row in record.metadata}
    assert rows["llama.rope.freq_base"] == (20000.0, True)
    assert rows["llama.context_length"] == (77, False) and rows["llama.made_up"] == (1, False)


def test_a_sound_file_from_elsewhere_is_left_to_a_forward(tmp_path: Path) -> None:
    checkpoint, plain, out = Checkpoint(issue_6056.CHECKPOINT), tmp_path / "plain.gguf", tmp_path / "other.gguf"
    checkpoint_to_gguf(checkpoint, plain)
    pair, random = Pair(plain, issue_6056.CHECKPOINT, issue_6056.HELDOUT), np.random.default_rng(0)
    moved = damaged(
        pair, tmp_path / "moved.gguf", "blk.*.weight",
        lambda v: v + random.normal(0, 0.1 * v.std(), v.shape) if v.ndim > 1 else v,
    )  # fmt: skip
    with open_gguf(issue_6056.CLEAN) as clean:
        types = {name: info.type for name, info in clean.tensors.items()}
    Engine(NATIVE).quantize_like(moved.gguf, out, types)
    record = inspected(replace(pair, gguf=out))
    assert record.verdict.all == ["inconclusive"] and exit_code(record.verdict) == 125
    assert "only a forward" in record.verdict.summary
    assert (record.verdict.next_step or "").startswith("diffharness restore ")


def test_issue_6056_in_one_command(tmp_path: Path) -> None:
    out = issue_6056.damage(tmp_path / "damaged.gguf")
    record = inspected(Pair(out, issue_6056.CHECKPOINT, issue_6056.HELDOUT))
    assert record.verdict.all == ["artifact.weights"]
    with open_gguf(issue_6056.CLEAN) as clean:
        hit = [name for name, info in clean.tensors.items() if issue_6056.is_hit(name, len(info.shape))]
    assert sorted(drifted(record)) == sorted(hit)
    periodic = next(row for row in record.patterns if row.kind == "periodic")
    assert (periodic.evidence["period"], periodic.evidence["residues"]) == (6, [2, 3, 4, 5])
    at = {klass: i for i, klass in enumerate(record.grid.classes)}
    q, norms = at["attn_q"], at["norms"]
    assert [il for il, row in zip(record.grid.layers, record.grid.drifted, strict=True) if row[q]] == [
        2, 3, 4, 5, 8, 9, 10, 11,
    ]  # fmt: skip
    assert not any(row[norms] for row in record.grid.drifted)
    text = to_text(document(record))
    assert "66 of 169 tensors drifted, 30 of them in attention" in text and "mod 6" in text
    assert "layer_output_scale" in to_markdown(document(record))


def larger(pair: Pair, out: Path, rows: int) -> Pair:
    """A copy whose vocabulary's tensors have more rows."""
    with open_gguf(pair.gguf) as source:

        def tensor(info: Any, raw: Any) -> Any:
            if info.name not in ("token_embd.weight", "output.weight"):
                return None
            values = source.read(info.name)
            values = np.concatenate([values, np.ones((rows, values.shape[1]), np.float32)])
            return "F32", values.shape, encode_floats(values, "F32")

        rewrite_gguf(source, out, tensor=tensor)
    return replace(pair, gguf=out)


def test_a_larger_vocabulary_is_compared_where_both_have_it(make_pair: MakePair, tmp_path: Path) -> None:
    record = inspected(larger(make_pair("llama", "F32"), tmp_path / "larger.gguf", 16))
    assert record.verdict.primary == "agree", record.verdict
    told = [f.message for f in record.findings]
    assert any("16 rows of token_embd.weight are only in the artifact" in message for message in told)


def test_other_sizes_are_refused_with_the_first_tensors(make_pair: MakePair, tmp_path: Path) -> None:
    narrow, wide = make_pair("llama", "F32"), make_pair("llama", "Q8_0")
    with pytest.raises(CheckpointError, match=r"tensors of .* have other shapes .* checkpoint \(\d+, \d+\), artifact"):
        inspected(replace(wide, checkpoint=narrow.checkpoint))
    with pytest.raises(CheckpointError, match="is a llama model, the artifact"):
        inspected(replace(make_pair("qwen3", "Q8_0"), checkpoint=wide.checkpoint))


def test_a_missing_tensor_is_damage(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("qwen3", "Q8_0")
    out = tmp_path / "less.gguf"
    with open_gguf(pair.gguf) as source:
        rewrite_gguf(source, out, without=["blk.1.attn_q_norm.weight"])
    record = inspected(replace(pair, gguf=out))
    assert record.missing == ["blk.1.attn_q_norm.weight"] and record.verdict.all == ["artifact.weights"]
    assert "missing from the artifact: blk.1.attn_q_norm.weight" in record.verdict.summary


def test_special_tokens_and_towers(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("llama", "Q8_0")
    folder = tmp_path / "checkpoint"
    shutil.copytree(pair.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 1, "eos_token_id": [2, 3]}))
    changed = rekeyed(pair, tmp_path / "r.gguf", tokenizer__ggml__bos_token_id=5, tokenizer__ggml__eos_token_id=3)
    record = inspected(replace(changed, checkpoint=folder))
    assert [(row.key, row.artifact, row.checkpoint, row.used) for row in record.metadata] == [
        ("tokenizer.ggml.bos_token_id", 5, 1, True)
    ]
    assert record.verdict.all == ["artifact.metadata"]


def test_progress_comes_to_its_end(make_pair: MakePair) -> None:
    seen: list[tuple[int, int]] = []
    inspected(make_pair("llama", "Q8_0"), watch=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0 and seen == sorted(seen)


def test_a_run_carries_the_patterns(make_pair: MakePair, tmp_path: Path) -> None:
    pair = damaged(make_pair("llama", "Q8_0"), tmp_path / "d.gguf", "blk.*.attn_q.weight", lambda v: v * np.float32(2))
    record = whole_run(pair, with_checkpoint=True)
    assert record.verdict.all == ["artifact.weights"]
    kinds = [row.kind for row in record.legs.artifact.patterns]
    assert "scale" in kinds and "class" in kinds
    assert "times" in record.verdict.summary
