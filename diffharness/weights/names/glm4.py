"""`glm4`: GLM-4-0414. ChatGLM's tensors under transformers' names, and norms after attention and feed-forward."""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._blocks import ATTENTION_BIAS, attention_matrices
from diffharness.weights.names._glm import fused_mlp, glm_config, glm_metadata
from diffharness.weights.names._keys import Keys, decoder_example, embedding_rules, vector
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._shared_experts import n_main_layers, nextn_metadata, nextn_rules
from diffharness.weights.source import Metadata

_ARCH = "glm4"


def metadata(config: Config) -> dict[str, Any]:
    return glm_metadata(config, _ARCH, bias=True) | nextn_metadata(config, _ARCH)


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    out = {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"} | glm_config(metadata, _ARCH)
    out["num_hidden_layers"] = n_main_layers(keys)
    if n_nextn := keys.get("nextn_predict_layers"):
        out["num_nextn_predict_layers"] = n_nextn
    return out


def rules(metadata: Metadata) -> list[TensorRule]:
    keys, out = Keys(metadata), embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        layer = [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *attention_matrices(keys, blk, hf + "self_attn.", bias=metadata.get(ATTENTION_BIAS)),
            vector(blk, "post_attention_norm", hf + "post_self_attn_layernorm", keys.n_embd),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
            *fused_mlp(keys, blk, hf + "mlp.gate_up_proj", hf + "mlp.down_proj"),
            vector(blk, "post_ffw_norm", hf + "post_mlp_layernorm", keys.n_embd),
        ]
        out += layer if il < n_main_layers(keys) else nextn_rules(keys, il, layer, hf)
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes, "glm4", "Glm4ForCausalLM", attention_bias=True, partial_rotary_factor=0.5, pad_token_id=0
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("glm4",),
    architectures=("Glm4ForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
