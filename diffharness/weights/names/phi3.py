"""`phi3`: Phi-3 mini and medium, Phi-3.5 mini, Phi-4 and Phi-4 mini.

One matrix for queries, keys and values, one for gate and up. The sliding window of some configs is written as the
engine's converter writes it, although the engine's graph has none.
"""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._config import expect_activation, without_rope
from diffharness.weights.names._gpt import fused_qkv, rotated_share
from diffharness.weights.names._keys import Keys, decoder_example, decoder_metadata, embedding_rules, matrix, vector
from diffharness.weights.names._longrope import longrope_example, longrope_metadata, longrope_rules
from diffharness.weights.names._map import PLAIN, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    out = decoder_metadata(without_rope(config), "phi3")
    n_rot = int(Keys(out).head_dim * rotated_share(config, 1.0))
    out |= longrope_metadata(config, "phi3", n_rot)
    out["phi3.attention.sliding_window"] = config.get("sliding_window") or 0
    return out


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, size = keys.n_embd, keys.integer("feed_forward_length"), keys.head_dim
    q, kv = keys.n_head * size, keys.n_head_kv * size
    n_rot = keys.integer("rope.dimension_count", size)
    out = [*embedding_rules(metadata), *longrope_rules(metadata, n_rot)]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        qkv = hf + "self_attn.qkv_proj"
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *fused_qkv(metadata, blk, qkv, (q, kv, kv), n_embd, layout=PLAIN, bias=False),
            *matrix(blk, "attn_output", hf + "self_attn.o_proj", n_embd, q),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
            *matrix(blk, "ffn_up", hf + "mlp.gate_up_proj", 2 * n_ff, n_embd),
            *matrix(blk, "ffn_down", hf + "mlp.down_proj", n_embd, n_ff),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    """As Phi-4 mini: a part of each head is turned, by LongRoPE, with an original context shorter than the tests'."""
    share = 0.75
    n_rot = int(sizes.n_embd // sizes.n_head * share)
    longrope = longrope_example(n_rot, 48)
    more: dict[str, Any] = {"partial_rotary_factor": share, "sliding_window": None, "pad_token_id": 0}
    return decoder_example(sizes, "phi3", "Phi3ForCausalLM", head_dim=None, **longrope, **more)


MAP = ArchMap(
    arch="phi3",
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
)
