"""Names and hyperparameters there and back: a checkpoint in GGUF's terms, made a checkpoint again, is that model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.names import config_of_tensors, for_arch
from tests.oracles import agree, tiny
from tests.oracles.conftest import Tiny

MakeTiny = Callable[..., Tiny]
FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3moe")
COVERED = [case for case in tiny.CASES if case.split("-")[0] in FAMILIES]


@pytest.mark.parametrize("case", COVERED)
def test_every_tensor_of_a_checkpoint_is_used(make_tiny: MakeTiny, case: str) -> None:
    checkpoint = make_tiny(case).checkpoint
    assert checkpoint.extra == []
    for name, info in checkpoint.tensors.items():
        assert checkpoint.read(name).shape == info.shape, name


@pytest.mark.parametrize("case", COVERED)
def test_a_model_written_back_has_the_same_logits(make_tiny: MakeTiny, case: str, tmp_path: Path) -> None:
    made = make_tiny(case)
    source = made.checkpoint
    arch = for_arch(source.arch)
    tensors = {}
    for rule in arch.rules(source.metadata):
        if rule.hf and rule.name in source.tensors:
            parts = rule.layout.to_hf(source.read(rule.name))
            tensors |= {hf: torch.from_numpy(np.array(part)) for hf, part in zip(rule.hf, parts, strict=True)}
    original = load_file(made.folder / "model.safetensors")
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[name], value) for name, value in original.items())

    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = config_of_tensors(arch.config(source.metadata), source.tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    again = agree.oracle_logits(model, made.ids)
    assert agree.nmse(again, agree.oracle_logits(made.model, made.ids)) <= 1e-12


@pytest.mark.parametrize("case", COVERED)
def test_the_old_form_of_a_config_is_the_same_model(make_tiny: MakeTiny, case: str, tmp_path: Path) -> None:
    made = make_tiny(case)
    folder = tmp_path / "old"
    shutil.copytree(made.folder, folder)
    tiny.old_config(folder)
    assert "rope_parameters" not in json.loads((folder / "config.json").read_text())
    assert Checkpoint(folder).metadata == made.checkpoint.metadata


@pytest.mark.parametrize("case", ["mixtral", "qwen3moe"])
def test_fused_experts_are_the_same_model(make_tiny: MakeTiny, case: str, tmp_path: Path) -> None:
    made = make_tiny(case)
    state = {name: value.contiguous() for name, value in made.model.state_dict().items()}
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in state)
    shutil.copy(made.folder / "config.json", tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fused, single = Checkpoint(tmp_path), made.checkpoint
    assert fused.tensors.keys() == single.tensors.keys()
    for name in single.tensors:
        assert np.array_equal(fused.read(name), single.read(name)), name


@pytest.mark.parametrize("case", COVERED)
def test_configs_are_what_transformers_reads(make_tiny: MakeTiny, case: str, tmp_path: Path) -> None:
    made = make_tiny(case)
    arch = for_arch(made.checkpoint.arch)
    (tmp_path / "config.json").write_text(json.dumps(arch.config(made.checkpoint.metadata)))
    config = AutoConfig.from_pretrained(tmp_path)
    original = made.model.config
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(original, key), key
    assert config.architectures[0] in arch.architectures
