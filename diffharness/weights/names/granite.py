"""`granite` and `granitemoe`: Llama's tensors with scales in the metadata.

Q and K rows are permuted to interleaved rotary pairs. A checkpoint keeps gate and up of all experts in one tensor, and
those of the shared MLP in another; GGUF has them apart. What a config leaves out the classes take as 1, the scale of
scores too, for which the format's default is another: all four scales are always written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import (
    ATTENTION_BIAS,
    MLP_BIAS,
    attention_rules,
    bias_metadata,
    mlp_rules,
)
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._keys import (
    Keys,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    matrix,
    rope_freqs_rule,
    vector,
)
from diffharness.weights.names._map import PLAIN, ArchMap, Config, Piece, Sizes, TensorRule
from diffharness.weights.source import Float32Array, Metadata

_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def scales(config: Config, arch: str) -> dict[str, float]:
    """The keys of all four scales, 1 where config.json leaves one out."""
    out = {}
    for key, name in _SCALES.items():
        value = 1.0 if config.get(name) is None else float(config[name])
        if value == 0.0:
            raise CheckpointError(f"config.json: `{name}`: expected a factor, found 0, which GGUF reads as none given")
        out[f"{arch}.{key}"] = value
    return out


def dense_metadata(config: Config) -> dict[str, Any]:
    return scaled_metadata(config, "granite")


def scaled_metadata(config: Config, arch: str) -> dict[str, Any]:
    """The keys that every Granite decoder has."""
    expect_activation(config, "silu")
    out = decoder_metadata(config, arch)
    return out | {
        f"{arch}.rope.dimension_count": Keys(out).head_dim,
        **scales(config, arch),
        **bias_metadata(config),
    }


def moe_metadata(config: Config) -> dict[str, Any]:
    out = scaled_metadata(config, "granitemoe")
    if config.get("num_local_experts"):
        out["granitemoe.expert_count"] = need_int(config, "num_local_experts")
        out["granitemoe.expert_used_count"] = need_int(config, "num_experts_per_tok")
    if config.get("shared_intermediate_size"):
        out["granitemoe.expert_shared_feed_forward_length"] = need_int(config, "shared_intermediate_size")
    return out


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_rot = keys.integer("rope.dimension_count", keys.head_dim)
    out = [*embedding_rules(metadata), rope_freqs_rule(metadata, n_rot)]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *attention_rules(metadata, il, permuted=True, bias=metadata.get(ATTENTION_BIAS)),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
        ]
        if keys.n_expert:
            out += _expert_rules(keys, blk, hf)
        else:
            out += mlp_rules(metadata, il, bias=metadata.get(MLP_BIAS))
    return out


def _expert_rules(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    n_embd, n_ff, n_expert = keys.n_embd, keys.integer("feed_forward_length"), keys.n_expert
    n_ff_shared = keys.integer("expert_shared_feed_forward_length", 0)
    moe, shared = hf + "block_sparse_moe.", hf + "shared_mlp."
    both, one = (n_expert, 2 * n_ff, n_embd), (n_expert, n_ff, n_embd)

    def expert(name: str, shape: tuple[int, ...], hf: str, alias: str, layout: Any) -> TensorRule:
        return TensorRule(blk + name, shape, (moe + hf,), layout, aliases=(((moe + alias,), layout),))

    out = [
        TensorRule(
            blk + "ffn_gate_inp.weight",
            (n_expert, n_embd),
            (moe + "router.layer.weight",),
            aliases=(((moe + "router.weight",), PLAIN),),
        ),
        expert("ffn_gate_exps.weight", one, "input_linear.weight", "experts.gate_up_proj", Piece(both, _rows(0, n_ff))),
        expert(
            "ffn_up_exps.weight", one, "input_linear.weight", "experts.gate_up_proj", Piece(both, _rows(n_ff, 2 * n_ff))
        ),
        expert("ffn_down_exps.weight", (n_expert, n_embd, n_ff), "output_linear.weight", "experts.down_proj", PLAIN),
    ]
    if n_ff_shared:
        pair, hf_pair = (n_ff_shared, n_embd), (shared + "input_linear.weight",)
        whole = (2 * n_ff_shared, n_embd)
        out += [
            TensorRule(blk + "ffn_gate_shexp.weight", pair, hf_pair, Piece(whole, _rows(0, n_ff_shared))),
            TensorRule(blk + "ffn_up_shexp.weight", pair, hf_pair, Piece(whole, _rows(n_ff_shared, 2 * n_ff_shared))),
            *matrix(blk, "ffn_down_shexp", shared + "output_linear", n_embd, n_ff_shared),
        ]
    return out


def _rows(start: int, stop: int) -> Callable[[Float32Array], Float32Array]:
    """Rows of a matrix, or of every matrix of a stack."""
    return lambda whole: whole[..., start:stop, :]


_SCALED: dict[str, Any] = {  # each far from 1, and from the default that the format has
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.35,
    "logits_scaling": 2.5,
}


def dense_example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "granite", "GraniteForCausalLM", head_dim=None, **_SCALED)


def moe_example(sizes: Sizes) -> dict[str, Any]:
    experts = {
        "num_local_experts": sizes.n_expert,
        "num_experts_per_tok": sizes.n_expert_used,
        "intermediate_size": sizes.n_ff_expert,
        "shared_intermediate_size": sizes.n_ff,
    }
    return decoder_example(
        sizes, "granitemoeshared", "GraniteMoeSharedForCausalLM", head_dim=None, **experts, **_SCALED
    )


MAPS = (
    ArchMap(
        arch="granite",
        model_types=("granite",),
        architectures=("GraniteForCausalLM",),
        metadata=dense_metadata,
        rules=rules,
        example=dense_example,
    ),
    ArchMap(
        arch="granitemoe",
        model_types=("granitemoe", "granitemoeshared"),
        architectures=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        metadata=moe_metadata,
        rules=rules,
        example=moe_example,
    ),
)
