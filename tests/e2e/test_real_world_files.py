"""Files as they come from converters and hubs: another spelling is no finding, what is unknown is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffharness import damage
from diffharness.errors import FixtureError
from diffharness.fixture import from_text, save_fixture
from diffharness.forensics.metadata import differences
from diffharness.settings import data_dir
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import rewrite_gguf
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.runs import NATIVE, whole_run
from tests.engine.planted import planted_python

EMBEDDED = data_dir("fixtures") / "tiny-gemma4"


def with_keys(pair: Pair, out: Path, kv: dict[str, Any]) -> Pair:
    with open_gguf(pair.gguf) as source:
        rewrite_gguf(source, out, kv=kv)
    return replace(pair, gguf=out)


def test_a_bidirectional_model_is_not_blamed_on_the_engine(make_pair: MakePair, tmp_path: Path) -> None:
    """The reference does not know it; what needs none is done, and settings of batches are no question then."""
    pair = with_keys(make_pair("qwen2"), tmp_path / "bidirectional.gguf", {"qwen2.attention.causal": False})
    record = whole_run(pair, grid="small")
    assert record.verdict.all == ["inconclusive"] and "qwen2.attention.causal" in record.verdict.summary
    assert record.legs.graph.status == "not_run" and "attention.causal" in (record.legs.graph.reason or "")
    assert record.legs.kernel.status == "pass" and record.legs.kernel.nodes_replayed > 50

    record = whole_run(pair, with_checkpoint=True)
    assert record.verdict.primary == "artifact.metadata", "by the checkpoint it is causal"
    leg = record.legs.artifact
    assert leg.tensors and not any(row.damaged for row in leg.tensors) and leg.logits is None


def test_damage_is_found_without_a_reference(make_pair: MakePair, tmp_path: Path) -> None:
    pair, out = make_pair("qwen2"), tmp_path / "damaged.gguf"
    damage.apply(pair.gguf, out, ["scale"], set_keys=["qwen2.attention.causal=bool:false"])
    record = whole_run(replace(pair, gguf=out), with_checkpoint=True)
    assert set(record.verdict.all) == {"artifact.weights", "artifact.metadata"}
    assert record.legs.graph.status == "not_run"


def test_keys_at_their_neutral_values_are_no_obstacle(make_pair: MakePair, tmp_path: Path) -> None:
    neutral = {"qwen2.attention.causal": True, "qwen2.expert_shared_count": 0}
    pair = with_keys(make_pair("qwen2"), tmp_path / "neutral.gguf", neutral)
    assert whole_run(pair, with_checkpoint=True).verdict.primary == "agree"


def test_a_stale_vocab_size_is_not_the_files_fault(tmp_path: Path) -> None:
    """llama.cpp shapes the embedding by the tokenizer's list."""
    pair = Pair(EMBEDDED / "tiny-gemma4-Q4_K_M.gguf", EMBEDDED / "checkpoint", EMBEDDED / "heldout.json")
    stale = with_keys(pair, tmp_path / "stale.gguf", {"gemma4.vocab_size": 500})
    assert whole_run(stale, n_tokens=64).verdict.primary == "agree"


def test_a_window_that_no_text_reaches_is_no_difference(make_pair: MakePair) -> None:
    """Converters drop Mistral's window; it matters to texts that are longer than it."""
    with open_gguf(make_pair("mistral").gguf) as artifact:
        theirs = {**artifact.metadata, "llama.attention.sliding_window": 4096}
        assert not [row for row in differences(artifact.metadata, theirs, "llama", n_tokens=512) if row.used]
        used = [row.key for row in differences(artifact.metadata, theirs, "llama", n_tokens=8192) if row.used]
        assert used == ["llama.attention.sliding_window"]


def test_padding_behind_the_vocabulary_may_be_cut_off(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("gemma3")
    padded = Path(shutil.copytree(pair.checkpoint, tmp_path / "padded"))
    tensors = load_file(padded / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    n_vocab = len(tensors[name])
    tensors[name] = np.concatenate((tensors[name], np.zeros((16, tensors[name].shape[1]), np.float32)))
    save_file(tensors, padded / "model.safetensors")
    config = json.loads((padded / "config.json").read_text())
    config["vocab_size"] = n_vocab + 16
    (padded / "config.json").write_text(json.dumps(config))
    record = whole_run(replace(pair, checkpoint=padded), with_checkpoint=True)
    assert record.verdict.primary == "agree", (record.verdict, [f.message for f in record.findings])
    assert record.legs.artifact.status == "pass"


def test_a_missing_key_is_metadata_if_the_checkpoint_knows_it(make_pair: MakePair, tmp_path: Path) -> None:
    key = "llama.attention.layer_norm_rms_epsilon"
    pair = with_keys(make_pair("llama"), tmp_path / "keyless.gguf", {key: None})
    record = whole_run(pair, with_checkpoint=True)
    assert record.verdict.primary == "artifact.metadata" and key in record.verdict.summary
    assert whole_run(pair).verdict.primary == "artifact.file"


def test_an_engine_that_cannot_tokenize_is_a_finding(tmp_path: Path) -> None:
    pair = Pair(EMBEDDED / "tiny-gemma4-Q4_K_M.gguf", EMBEDDED / "checkpoint", EMBEDDED / "heldout.json")
    unknown = with_keys(pair, tmp_path / "unknown.gguf", {"tokenizer.ggml.pre": "nobody-knows-it"})
    record = whole_run(replace(unknown), n_tokens=64)
    assert record.legs.tokens.status == "not_run"
    assert record.verdict.primary == "inconclusive", record.verdict
    text_only = whole_run(replace(unknown, fixture=Path("english")), n_tokens=64)
    assert text_only.verdict.primary == "inconclusive" and text_only.verdict.next_step is not None


def test_a_dead_interpreter_is_not_a_verdict_against_the_file(make_pair: MakePair, tmp_path: Path) -> None:
    python = planted_python(tmp_path / "bin", "silent", node="attn_norm-0")
    record = whole_run(make_pair("llama"), engine=NATIVE.changed(python=python))
    assert record.verdict.primary == "engine.crash"
    assert not [kind for kind in record.verdict.all if kind.startswith("artifact")]


def test_a_fixture_of_another_tokenizer_is_told_also_without_a_checkpoint(tmp_path: Path) -> None:
    text = "Another tokenizer gives other ids."
    fixture = tmp_path / "other.json"
    other = from_text(text, lambda t: [5 + ord(c) % 90 for c in t], name="other", tokenizer_kind="tokenizer.json")
    save_fixture(other, fixture)
    with pytest.raises(FixtureError, match="another tokenizer"):
        whole_run(Pair(EMBEDDED / "tiny-gemma4-Q4_K_M.gguf", EMBEDDED / "checkpoint", fixture))


def test_a_plain_conversion_differs_in_nothing(tmp_path: Path) -> None:
    checkpoint = Checkpoint(EMBEDDED / "checkpoint")
    checkpoint_to_gguf(checkpoint, tmp_path / "plain.gguf", type_name="BF16")
    with open_gguf(tmp_path / "plain.gguf") as artifact:
        assert differences(artifact.metadata, checkpoint.metadata, artifact.arch) == []
