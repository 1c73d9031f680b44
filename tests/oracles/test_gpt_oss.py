"""gpt-oss as OpenAI publishes it, experts in MXFP4: the numbers are those that transformers unpacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from diffharness.errors import CheckpointError
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.synth import SynthSource
from tests.oracles import agree

MATRICES = ("gate_up_proj", "down_proj")


def packed(folder: Path) -> dict[str, np.ndarray]:
    """Give the checkpoint in `folder` random MXFP4 experts; what transformers makes of them, by the matrix's name."""
    tensors, made = load_file(folder / "model.safetensors"), {}
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(MATRICES)]:
        n_expert, n_in, n_out = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (n_expert, n_out, n_in // 32, 16), dtype=np.uint8)
        scales = rng.integers(120, 127, (n_expert, n_out, n_in // 32), dtype=np.uint8)
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
        unpacked = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
        made[name] = unpacked.numpy()
    save_file(tensors, folder / "model.safetensors")
    return made


def test_mxfp4_experts(tmp_path: Path) -> None:
    source = SynthSource("gpt-oss")
    write_checkpoint(tmp_path / "hf", source, config=source.config)
    plain = load_file(tmp_path / "hf" / "model.safetensors")
    made = packed(tmp_path / "hf")
    checkpoint = Checkpoint(tmp_path / "hf")
    assert checkpoint.extra == []

    save_folder = tmp_path / "unpacked"
    save_folder.mkdir()
    config = (tmp_path / "hf" / "config.json").read_text()
    (save_folder / "config.json").write_text(json.dumps(json.loads(config) | {"dtype": "float32"}))
    save_file({**plain, **{k: np.ascontiguousarray(v) for k, v in made.items()}}, save_folder / "model.safetensors")
    unpacked = Checkpoint(save_folder)
    for part in ("gate", "up", "down"):
        name = f"blk.1.ffn_{part}_exps.weight"
        assert checkpoint.tensors[name].type == "MXFP4" and checkpoint.by_rows(name)
        assert np.array_equal(checkpoint.read(name), unpacked.read(name))
        assert np.array_equal(checkpoint.take(name, slice(2, 4)), unpacked.read(name)[2:4])
    ids = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(agree.reference_logits(checkpoint, ids), agree.reference_logits(unpacked, ids))


def test_packed_experts_of_another_size_are_refused(tmp_path: Path) -> None:
    source = SynthSource("gpt-oss")
    write_checkpoint(tmp_path, source, config=source.config)
    packed(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({**tensors, name: tensors[name][:, :-1].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="down_proj_scales is U8"):
        Checkpoint(tmp_path)
