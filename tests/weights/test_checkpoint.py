"""Reading Hugging Face folders, those that other programs wrote and those that are broken."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffharness.errors import CheckpointError
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.safetensors_file import SafetensorsFile
from tests.weights.tiny import LLAMA_CONFIG, MIXTRAL_CONFIG, MemorySource, random_source


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return random_source(LLAMA_CONFIG)


@pytest.fixture
def folder(source: MemorySource, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "tiny", source)
    return tmp_path / "tiny"


def edit(folder: Path, change: dict[str, Any]) -> None:
    """Change config.json; None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def shard(folder: Path, n: int = 3) -> None:
    """Turn the single file into shards with an index."""
    tensors = stored(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % n + 1:05d}-of-{n:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({k: t for k, t in tensors.items() if weight_map[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_tensors_and_metadata_in_gguf_terms(folder: Path, source: MemorySource) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.arch == "llama" and checkpoint.label == "tiny"
    assert checkpoint.metadata["llama.attention.head_count_kv"] == 2
    assert set(checkpoint.tensors) == set(source.tensors)
    for name, want in source.arrays.items():
        assert checkpoint.tensors[name].shape == want.shape and checkpoint.tensors[name].type == "F32"
        assert np.array_equal(checkpoint.read(name), want)
    assert checkpoint.extra == [] and checkpoint.ignored == [] and checkpoint.tokenizer_path is None


def test_q_and_k_rows_are_permuted(folder: Path) -> None:
    q = stored(folder)["model.layers.0.self_attn.q_proj.weight"].numpy()
    got = Checkpoint(folder).read("blk.0.attn_q.weight")
    half = 64 // 4 // 2
    assert np.array_equal(got[0], q[0]) and np.array_equal(got[1], q[half]) and np.array_equal(got[2], q[1])


@pytest.mark.parametrize(("dtype", "torch_type"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision(
    folder: Path, dtype: str, torch_type: torch.dtype, source: MemorySource, tmp_path: Path
) -> None:
    half = {name: tensor.to(torch_type) for name, tensor in stored(folder).items()}
    save_file(half, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    for name, want in source.arrays.items():
        assert checkpoint.tensors[name].type == dtype
        assert np.array_equal(checkpoint.read(name), torch.from_numpy(want).to(torch_type).float().numpy())
    write_checkpoint(tmp_path / "own", source, dtype=dtype)  # our own rounding is torch's
    for name, tensor in stored(tmp_path / "own").items():
        assert torch.equal(tensor, half[name])


def test_shards_with_an_index(folder: Path, source: MemorySource) -> None:
    shard(folder)
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.paths) == 3
    for name, want in source.arrays.items():
        assert np.array_equal(checkpoint.read(name), want)


def test_rows_are_taken_without_reading_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(folder)
    wanted: list[Any] = []
    read = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda self, name, rows=None: (wanted.append((name, rows)), read(self, name, rows))[1]
    )
    rows = np.array([7, 3])
    taken = checkpoint.take("token_embd.weight", rows)
    assert len(wanted) == 1 and wanted[0][0] == "model.embed_tokens.weight" and wanted[0][1] is rows
    assert np.array_equal(taken, checkpoint.read("token_embd.weight")[rows])
    for name in checkpoint.tensors:
        for part in (slice(1, 3), rows):
            assert np.array_equal(checkpoint.take(name, part), checkpoint.read(name)[part])


def test_only_the_experts_that_are_wanted_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random_source(MIXTRAL_CONFIG)
    write_checkpoint(tmp_path, source)
    checkpoint = Checkpoint(tmp_path)
    name = "blk.1.ffn_up_exps.weight"
    assert np.array_equal(checkpoint.read(name), source.arrays[name])
    wanted: list[str] = []
    read = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda self, name, rows=None: (wanted.append(name), read(self, name, rows))[1]
    )
    assert np.array_equal(checkpoint.take(name, np.array([2, 0])), source.arrays[name][[2, 0]])
    assert [w.split(".")[5] for w in wanted] == ["2", "0"]


def test_the_hash_is_of_the_config_and_the_weights(folder: Path) -> None:
    parts = (folder / "config.json").read_bytes() + (folder / "model.safetensors").read_bytes()
    assert Checkpoint(folder).sha256() == hashlib.sha256(parts).hexdigest()


def add(folder: Path, *names: str, value: torch.Tensor | None = None) -> None:
    more = torch.zeros(3) if value is None else value
    save_file({**stored(folder), **{name: more.clone() for name in names}}, folder / "model.safetensors")


def test_tensors_of_another_tower_or_for_training_are_listed(folder: Path) -> None:
    names = ["mtp.layers.0.norm.weight", "vision_tower.layers.0.q_proj.bias", "v_head.weight", "score.weight"]
    add(folder, *names)
    assert sorted(Checkpoint(folder).extra) == sorted(names)


def test_buffers_are_ignored(folder: Path) -> None:
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    add(folder, *names)
    checkpoint = Checkpoint(folder)
    assert sorted(checkpoint.ignored) == sorted(names) and checkpoint.extra == []


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.input_layernorm.bias",  # config.json would have to announce LayerNorms
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.2.mlp.up_proj.weight",  # a layer more than there are
        "model.norm.bias",
        "model.embed_positions.weight",
        "lm_head.bias",
    ],
)
def test_a_tensor_of_the_text_model_that_nobody_reads_is_refused(folder: Path, name: str) -> None:
    assert "model.layers.2" not in " ".join(stored(folder))
    add(folder, name)
    with pytest.raises(CheckpointError, match=rf"1 tensor is not of the llama model .*: {name}") as caught:
        Checkpoint(folder)
    assert "compare config.json" in str(caught.value)
    edit(folder, {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(CheckpointError, match="give the one that it was made from"):
        Checkpoint(folder)


def test_a_second_head_is_the_embedding_again_or_another_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_source({**LLAMA_CONFIG, "tie_word_embeddings": True}))
    embedding = stored(tmp_path)["model.embed_tokens.weight"]
    add(tmp_path, "lm_head.weight", value=embedding.clone())
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.ignored == ["lm_head.weight"] and "output.weight" not in checkpoint.tensors
    add(tmp_path, "lm_head.weight", value=embedding * 1.01)
    assert_refused(tmp_path, "says that the head is the embedding, but lm_head.weight is another")


# ── bad input ────────────────────────────────────────────────────────────────────────────────────


def assert_refused(folder: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(folder)


def test_no_folder_and_a_file(folder: Path) -> None:
    assert_refused(folder / "none", "found nothing")
    assert_refused(folder / "config.json", "found a file")


def test_config_missing_or_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert_refused(folder, "expected JSON")
    (folder / "config.json").write_text("[1]")
    assert_refused(folder, "expected a JSON object, found list")
    (folder / "config.json").write_text("[" * 100_000)
    assert_refused(folder, "expected JSON")
    (folder / "config.json").unlink()
    assert_refused(folder, r"no config\.json")


def test_an_unknown_architecture_says_which_are_known(folder: Path) -> None:
    edit(folder, {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"]})
    with pytest.raises(CheckpointError, match="rwkv7") as caught:
        Checkpoint(folder)
    assert "llama" in str(caught.value) and "gemma3" in str(caught.value)


def test_another_size(folder: Path) -> None:
    edit(folder, {"intermediate_size": 100})
    assert_refused(folder, r"mlp\.\w+_proj\.weight has shape")


@pytest.mark.parametrize("value", ["x", -1, 0, 1e300, float("nan"), [], {}, True, [1, 2], {"a": 1}, 10**30])
@pytest.mark.parametrize("config", [LLAMA_CONFIG, MIXTRAL_CONFIG], ids=["llama", "mixtral"])
def test_hostile_configs_are_checkpoint_errors(tmp_path: Path, config: dict[str, Any], value: object) -> None:
    write_checkpoint(tmp_path, random_source(config))
    whole = json.loads((tmp_path / "config.json").read_text())
    sizes = [k for k, v in whole.items() if isinstance(v, int) and not isinstance(v, bool)]
    assert len(sizes) >= 8
    for key in sizes:
        (tmp_path / "config.json").write_text(json.dumps({**whole, key: value}))
        try:
            checkpoint = Checkpoint(tmp_path)
        except CheckpointError as error:
            assert error.message
        else:  # a value that no shape depends on
            assert set(checkpoint.tensors) and key not in ("vocab_size", "hidden_size", "intermediate_size")


def test_more_layers_than_there_are_tensors(folder: Path) -> None:
    edit(folder, {"num_hidden_layers": 3})
    assert_refused(folder, r"9 tensors of a llama model are missing: model\.layers\.2")


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert_refused(folder, r"1 of 3 shards are missing: model-00002-of-00003\.safetensors")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{}", "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "plain file names"),
        ("nonsense", "expected JSON"),
    ],
)
def test_a_bad_index(folder: Path, index: str, says: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert_refused(folder, says)


def test_shards_without_an_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert_refused(folder, r"3 safetensors files, but no model\.safetensors\.index\.json")


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert_refused(folder, r"no model\.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert_refused(folder, "never opened")


def test_damaged_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:4],
        whole[:100],
        whole[:-1],
        struct.pack("<Q", 1 << 60) + whole[8:],
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        path.write_bytes(damaged)
        assert_refused(folder, r"model\.safetensors: expected a whole safetensors file")


def test_a_type_that_is_no_plain_float(folder: Path) -> None:
    tensors = stored(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    assert_refused(folder, "F8_E4M3")
