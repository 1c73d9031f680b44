"""Folders that are written: transformers loads them, and every architecture survives the way there and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffharness.errors import ArtifactFileError, OutputError
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.names._keys import TIED_HEAD
from tests.weights.tiny import LLAMA_CONFIG, MIXTRAL_CONFIG, random_source


@pytest.mark.parametrize("config", [LLAMA_CONFIG, MIXTRAL_CONFIG], ids=["llama", "mixtral"])
def test_gguf_to_checkpoint_and_back(tmp_path: Path, config: dict[str, object]) -> None:
    source = random_source(config)
    assert write_checkpoint(tmp_path / "hf", source) == []
    checkpoint_to_gguf(Checkpoint(tmp_path / "hf"), tmp_path / "a.gguf")
    with open_gguf(tmp_path / "a.gguf") as file:
        assert file.arch == "llama" and file.vocab_size == config["vocab_size"]
        assert set(file.tensors) == set(source.tensors)
        for name, want in source.arrays.items():
            assert np.array_equal(file.read(name), want)
        for key, value in source.metadata.items():
            assert file.metadata[key] == pytest.approx(value)
        write_checkpoint(tmp_path / "again", file)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()


def test_transformers_loads_it(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = random_source(LLAMA_CONFIG)
    write_checkpoint(tmp_path, source)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert np.array_equal(model.lm_head.weight.detach().numpy(), source.arrays["output.weight"])
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_a_tied_head_is_said_in_the_config(tmp_path: Path) -> None:
    source = random_source(LLAMA_CONFIG)
    del source.arrays["output.weight"], source.tensors["output.weight"]
    source.metadata = {k: v for k, v in source.metadata.items() if k != TIED_HEAD}  # a file from elsewhere
    write_checkpoint(tmp_path, source)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True


def test_what_the_map_does_not_know_is_left_out_and_told(tmp_path: Path) -> None:
    source = random_source(LLAMA_CONFIG)
    info = source.tensors["output_norm.weight"]
    source.tensors["surprise.weight"] = type(info)("surprise.weight", (4,), "F32", 16)
    assert write_checkpoint(tmp_path, source) == ["surprise.weight"]


def test_refusals(tmp_path: Path) -> None:
    source = random_source(LLAMA_CONFIG)
    with pytest.raises(ValueError, match="Q4_0 is not a type of checkpoints"):
        write_checkpoint(tmp_path, source, dtype="Q4_0")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        write_checkpoint(tmp_path / "file" / "folder", source)
    del source.arrays["blk.1.attn_q.weight"], source.tensors["blk.1.attn_q.weight"]
    with pytest.raises(ArtifactFileError, match=r"blk\.1\.attn_q\.weight is missing"):
        write_checkpoint(tmp_path, source)
    source.arch = "rwkv7"
    with pytest.raises(ArtifactFileError, match="rwkv7"):
        write_checkpoint(tmp_path, source)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
