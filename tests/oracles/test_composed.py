"""Models that transformers does not have, put together of parts that it has: a third witness beside the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.synth import SynthSource
from tests.oracles import agree

IDS = torch.randint(0, 160, (80,), generator=torch.Generator().manual_seed(1))
PARTS = ("gate_proj", "up_proj", "down_proj")


def tensors_of(folder: Path, source: SynthSource) -> dict[str, Tensor]:
    """The checkpoint's tensors, under its own names."""
    write_checkpoint(folder, source, config=source.config)
    return load_file(folder / "model.safetensors")


def split_qkv(tensors: dict[str, Tensor], n_head: int, n_kv: int, size: int) -> dict[str, Tensor]:
    """Bailing's names for the embedding and attention as Llama has them."""
    out = {}
    for name, value in tensors.items():
        if name.endswith("attention.query_key_value.weight"):
            rows = [n_head * size, n_kv * size, n_kv * size]
            for part, rows_of in zip("qkv", value.split(rows), strict=True):
                out[name.replace("attention.query_key_value", f"self_attn.{part}_proj")] = rows_of.contiguous()
        else:
            renamed = name.replace("word_embeddings", "embed_tokens").replace("attention.dense", "self_attn.o_proj")
            renamed = renamed.replace("attention.query_layernorm", "self_attn.q_norm")
            out[renamed.replace("attention.key_layernorm", "self_attn.k_norm")] = value
    return out


def test_ling_2_is_glm_4_5_under_other_names(tmp_path: Path) -> None:
    source = SynthSource("bailingmoe2")
    tensors = split_qkv(tensors_of(tmp_path / "ling", source), 4, 2, 16)
    renamed = {k.replace("gate.expert_bias", "gate.e_score_correction_bias"): v for k, v in tensors.items()}
    told = {key: value for key, value in source.config.items() if key not in ("architectures", "model_type")}
    told |= {"n_routed_experts": told.pop("num_experts"), "n_shared_experts": told.pop("num_shared_experts")}
    config = Glm4MoeConfig(**told, attention_bias=False)
    config.save_pretrained(tmp_path / "glm")
    save_file(renamed, tmp_path / "glm" / "model.safetensors", metadata={"format": "pt"})
    model = Glm4MoeForCausalLM.from_pretrained(tmp_path / "glm", dtype=torch.float32, attn_implementation="eager")
    ours = agree.reference_logits(Checkpoint(tmp_path / "ling"), IDS)
    assert agree.nmse(ours, agree.oracle_logits(model.eval(), IDS)) <= 1e-10


@pytest.mark.parametrize("arch", ["deepseek", "bailingmoe"])
def test_llamas_attention_and_v2s_experts(arch: str, tmp_path: Path) -> None:
    changes = {"norm_topk_prob": False} | ({"head_dim": None} if arch == "bailingmoe" else {})
    source = SynthSource(arch, changes=changes)
    tensors = split_qkv(tensors_of(tmp_path / "hf", source), 4, 2, 16)
    told = {key: value for key, value in source.config.items() if key not in ("architectures", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**told, attn_implementation="eager"))
    experts = DeepseekV2Config(
        hidden_size=64,
        moe_intermediate_size=64,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=2,
        experts_implementation="eager",
    )
    for il in range(told["first_k_dense_replace"], 4):
        model.model.layers[il].mlp = DeepseekV2Moe(experts)
        mlp = f"model.layers.{il}.mlp.experts."
        of = {part: [tensors.pop(f"{mlp}{i}.{part}.weight") for i in range(6)] for part in PARTS}
        pairs = [torch.cat(pair) for pair in zip(of["gate_proj"], of["up_proj"], strict=True)]
        tensors[mlp + "gate_up_proj"] = torch.stack(pairs)
        tensors[mlp + "down_proj"] = torch.stack(of["down_proj"])
    model.load_state_dict(tensors)
    ours = agree.reference_logits(Checkpoint(tmp_path / "hf"), IDS)
    assert agree.nmse(ours, agree.oracle_logits(model.eval(), IDS)) <= 1e-10
