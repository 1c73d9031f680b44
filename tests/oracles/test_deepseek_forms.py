"""Forms of DeepSeek's and GLM's families beside the usual: old files, layers not run, first publications."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffharness.errors import CheckpointError, UnsupportedError
from diffharness.fixture import from_ids, save_fixture
from diffharness.pipeline.reference_runs import GraphRuns
from diffharness.reference import archs
from diffharness.reference.archs.deepseek2 import outside_best_groups
from diffharness.weights import names
from diffharness.weights.check import check_model
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.names import chatglm, deepseek2
from diffharness.weights.names._keys import Keys
from diffharness.weights.synth import SynthSource
from tests.e2e.conftest import Pair
from tests.e2e.runs import graph_only
from tests.oracles import agree
from tests.oracles.cases import CASES
from tests.oracles.cases.deepseek import CASES as deepseek_cases
from tests.oracles.cases.deepseek import GLM, V2, yarn

IDS = torch.randint(0, 160, (80,), generator=torch.Generator().manual_seed(1))

CHATGLM: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 256,
    "padded_vocab_size": 160,
    "layernorm_epsilon": 1e-3,
    "rope_ratio": 0.5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
}


def checkpoint_of(folder: Path, arch: str, changes: Mapping[str, Any] | None = None) -> Checkpoint:
    source = SynthSource(arch, changes=changes)
    write_checkpoint(folder, source, config=source.config)
    checkpoint = Checkpoint(folder)
    assert checkpoint.extra == []
    return checkpoint


def strict_engine_agrees(checkpoint: Checkpoint, folder: Path) -> GraphRuns:
    """The checkpoint as GGUF, held against the strict engine."""
    gguf, ids = folder / "model.gguf", folder / "ids.json"
    checkpoint_to_gguf(checkpoint, gguf)
    with open_gguf(gguf) as artifact:
        assert check_model(artifact) == []
    save_fixture(from_ids(IDS.tolist(), name="random", chunk=128), ids)
    runs = graph_only(Pair(gguf, checkpoint.path, ids), folder)
    assert runs.definition.ok and runs.definition.complete
    assert max(row.nmse_local for row in runs.definition.judged if row.nmse_local is not None) <= 1e-8
    return runs


def unabsorbed(metadata: dict[str, Any]) -> dict[str, Any]:
    """The keys of a file of before `attn_k_b` and `attn_v_b`: as many KV heads as heads, each with its own size."""
    out = dict(metadata)
    for name in ("key_length", "value_length"):
        out[f"deepseek2.attention.{name}"] = out.pop(f"deepseek2.attention.{name}_mla")
    return out | {"deepseek2.attention.head_count_kv": out["deepseek2.attention.head_count"]}


@pytest.mark.parametrize("changes", [{}, V2 | yarn(mscale=0.707, mscale_all_dim=0.707)], ids=["v3", "v2"])
def test_old_files_with_one_matrix_for_keys_and_values(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = checkpoint_of(tmp_path / "hf", "deepseek2", changes)
    old_map = replace(deepseek2.MAP, metadata=lambda config: unabsorbed(deepseek2.metadata(config)))
    monkeypatch.setitem(names.MAPS, "deepseek2", old_map)
    old = Checkpoint(tmp_path / "hf")
    assert old.extra == [] and "blk.0.attn_kv_b.weight" in old.tensors
    assert agree.nmse(agree.reference_logits(old, IDS), agree.reference_logits(new, IDS)) <= 1e-10
    runs = strict_engine_agrees(old, tmp_path)
    assert {"blk.0.attn_q_rope", "blk.0.attn_k_rope", "blk.0.attn_v"} <= {row.tap for row in runs.definition.judged}


@pytest.mark.parametrize(
    ("arch", "changes"),
    [("deepseek2", GLM), ("glm4", {}), ("glm4moe", {}), ("bailingmoe2", {})],
    ids=lambda v: str(v)[:11],
)
def test_layers_for_further_tokens_are_not_part_of_the_forward(
    arch: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    plain = checkpoint_of(tmp_path / "plain", arch, changes)
    more = checkpoint_of(tmp_path / "more", arch, changes | {"num_nextn_predict_layers": 1})
    further = [name for name in more.tensors if name.startswith("blk.4.")]
    assert more.metadata[f"{arch}.block_count"] == 5 and any(".nextn." in name for name in further)
    assert more.tensors.keys() - plain.tensors.keys() == set(further)
    assert torch.equal(agree.reference_logits(more, IDS), agree.reference_logits(plain, IDS))
    runs = strict_engine_agrees(more, tmp_path)
    assert not any(tap.startswith("blk.4.") for tap in runs.taps)


def test_deepseek_v3s_own_further_layer_is_left_out(tmp_path: Path) -> None:
    changes = {"num_nextn_predict_layers": 1}
    assert SynthSource("deepseek2", changes=changes).metadata == SynthSource("deepseek2").metadata


def test_chatglm_as_first_published(tmp_path: Path) -> None:
    first = checkpoint_of(tmp_path / "first", "chatglm", CHATGLM)
    assert "blk.0.attn_qkv.bias" in first.tensors and "blk.0.attn_q.weight" not in first.tensors
    assert first.metadata["chatglm.rope.freq_base"] == 5000.0
    strict_engine_agrees(first, tmp_path)

    # The same model in transformers' words.
    later = SynthSource("chatglm", changes={"tie_word_embeddings": False})
    assert later.metadata.keys() == first.metadata.keys()
    differing = {key for key in later.metadata if later.metadata[key] != first.metadata[key]}
    assert differing == {"diffharness.fused_qkv"}


def test_a_normalised_head_is_normalised_once(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "hf", "bailingmoe", {"norm_head": True})
    lengths = np.linalg.norm(checkpoint.read("output.weight"), axis=0)
    assert np.allclose(lengths, 1, atol=1e-5)


def test_groups_are_chosen_by_their_best_expert() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4, 0.4, 0.3, 0.6]])  # sums of two: 0.6, 0.8, 0.9
    assert outside_best_groups(scores, 3, 2).tolist() == [[False, False, True, True, False, False]]


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("deepseek2", {"attention_bias": True}),
        ("deepseek2", {"rope_interleave": False}),
        ("deepseek2", {"moe_layer_freq": 2}),
        ("deepseek2", {"scoring_func": "noaux"}),
        ("deepseek2", V2 | {"n_group": 2}),
        ("deepseek2", GLM | {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}),
        ("deepseek", {"attention_bias": True}),
        ("dots1", {"attention_bias": True}),
        ("bailingmoe", {"use_qkv_bias": True}),
        ("bailingmoe", {"first_k_dense_replace": 1}),
        ("bailingmoe2", {"head_dim": 32}),
        ("chatglm", {"head_dim": 32}),
        ("chatglm", CHATGLM | {"rmsnorm": False}),
        ("glm4", {"hidden_act": "gelu"}),
    ],
)
def test_configs_without_a_gguf_form_are_refused(arch: str, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        SynthSource(arch, changes=changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.5),
        ("attention.temperature_scale", 0.1),
        ("rope.scaling.attn_factor", 0.5),
        ("rope.dimension_count", 64),
        ("expert_gating_func", 9),
    ],
)
def test_keys_that_make_another_model_are_refused(key: str, value: object) -> None:
    metadata = dict(SynthSource("deepseek2").metadata)
    with pytest.raises(UnsupportedError, match=key):
        archs.build(metadata | {f"deepseek2.{key}": value})


def test_mscale_of_its_own_is_kept() -> None:
    model = archs.build(SynthSource("deepseek2", changes=yarn(mscale=1.0, mscale_all_dim=0.5)).metadata)
    assert isinstance(model, archs.deepseek2.Deepseek2)
    ln4 = float(np.log(4.0))
    assert model.rope_scaling.magnitude == pytest.approx((0.1 * ln4 + 1) / (0.05 * ln4 + 1))
    assert model.attn_scale == pytest.approx((0.05 * ln4 + 1) ** 2 * 40**-0.5)


def test_first_files_of_glm_flash_gate_by_sigmoid() -> None:
    metadata = dict(SynthSource("deepseek2", changes=GLM).metadata)
    del metadata["deepseek2.expert_gating_func"]
    assert _gating(metadata) == "softmax"
    assert _gating(metadata | {"deepseek2.block_count": 47, "deepseek2.vocab_size": 154880}) == "sigmoid"


def _gating(metadata: Mapping[str, Any]) -> str:
    model = archs.build(metadata)
    assert isinstance(model, archs.deepseek2.Deepseek2)
    return model.gating


def test_sections_of_glm4_mean_half_split_pairs() -> None:
    metadata = dict(SynthSource("glm4").metadata)
    assert archs.build(metadata).rotary(0).interleaved
    assert not archs.build(metadata | {"glm4.rope.dimension_sections": [4, 2, 2, 0]}).rotary(0).interleaved


def test_chatglm_of_unknown_making_may_have_either_form(tmp_path: Path) -> None:
    metadata = dict(SynthSource("chatglm").metadata)
    del metadata["diffharness.fused_qkv"]
    rules = {rule.name: rule.required for rule in chatglm.rules(metadata)}
    assert rules["blk.0.attn_qkv.weight"] is rules["blk.0.attn_q.weight"] is False
    assert rules["blk.0.attn_output.weight"]


OWN = [name for name, case in CASES.items() if case.arch in {case.arch for case in deepseek_cases.values()}]
NEUTRAL = (None, 0, 1, 1.0, False)  # what a key says that may as well be absent


@pytest.mark.parametrize("name", OWN)
def test_metadata_make_a_config_that_makes_them(name: str) -> None:
    case = CASES[name]
    arch_map, metadata = names.MAPS[case.arch], SynthSource(case.arch, case.sizes, changes=case.changes).metadata
    assert arch_map.config is not None
    again = arch_map.metadata(arch_map.config(metadata))
    own_size = {f"{case.arch}.attention.{of}_length": Keys(metadata).head_dim for of in ("key", "value")}
    was, now = own_size | dict(metadata), own_size | again
    assert not {key for key in {*was, *now} if not _same(was.get(key), now.get(key))}


def _same(a: object, b: object) -> bool:
    close = isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-9 * abs(b)
    return a == b or close or (a in NEUTRAL and b in NEUTRAL)
