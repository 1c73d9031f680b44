"""`granite` and `granitemoe`: Llama's tensors with scales in the metadata.

Q and K rows are permuted to interleaved rotary pairs. A checkpoint keeps gate and up of all experts in one tensor, and
those of the shared MLP in another; GGUF has them apart. What a config leaves out the classes take as 1, the scale of
scores too, for which the format's default is another: all four scales are always written.

Granite 4 has one class for all its models, `granitemoehybrid`; those without recurrent layers are `granite` or
`granitemoe` in GGUF, without and with experts. Without experts the shared MLP is the feed-forward, as wide as
`shared_intermediate_size` says; the engine's converter states `intermediate_size`, which in released models is the
same. Without `position_embedding_type` rope nothing turns: `granite` has a switch for that, which the converter leaves
on, `granitemoe` has none.
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
from diffharness.weights.names._map import PLAIN, ArchMap, Config, Layout, Piece, Sizes, TensorRule
from diffharness.weights.source import Float32Array, Metadata

HYBRID = "granitemoehybrid"  # the model type of all of Granite 4
SHARED_MLP = "diffharness.shared_mlp"  # bool: the feed-forward is what the checkpoint calls its shared MLP

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


def attends(config: Config) -> list[bool]:
    """By layer, whether it attends, in a config.json of Granite 4 or Bamba; the others are recurrent."""
    n_layer = need_int(config, "num_hidden_layers")
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if kinds is not None:
        known = {"attention": True, "full_attention": True, "mamba": False, "linear_attention": False}
        found = [known.get(kind) for kind in kinds]
        if len(found) == n_layer and None not in found:
            return [bool(attention) for attention in found]
        raise CheckpointError(f"config.json: `layer_types`: expected {n_layer} of {', '.join(known)}, found {kinds}")
    return [il in (config.get("attn_layer_indices") or ()) for il in range(n_layer)]


def dense_metadata(config: Config) -> dict[str, Any]:
    if config.get("model_type") != HYBRID:
        return scaled_metadata(config, "granite")
    out = scaled_metadata({**config, "intermediate_size": need_int(config, "shared_intermediate_size")}, "granite")
    return out | {SHARED_MLP: True, "granite.rope.scaling.finetuned": turns(config)}


def turns(config: Config) -> bool:
    """Whether a Granite 4 has a rotary embedding."""
    return bool(config.get("position_embedding_type") == "rope")


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
    if config.get("model_type") == HYBRID and not turns(config):
        raise CheckpointError(
            "config.json: `position_embedding_type`: expected rope, found "
            f"{config.get('position_embedding_type')!r}, which GGUF cannot say of a `granitemoe`"
        )
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
            out += expert_rules(keys, blk, hf)
        elif metadata.get(SHARED_MLP):
            out += shared_mlp_rules(blk, "", hf + "shared_mlp.", keys.integer("feed_forward_length"), keys.n_embd)
        else:
            out += mlp_rules(metadata, il, bias=metadata.get(MLP_BIAS))
    return out


def expert_rules(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    """Router, stacks of experts and, where there is one, the shared MLP; `blk` and `hf` are a layer's prefixes."""
    n_embd, n_ff, n_expert = keys.n_embd, keys.integer("feed_forward_length"), keys.n_expert
    n_ff_shared, moe = keys.integer("expert_shared_feed_forward_length", 0), hf + "block_sparse_moe."
    both, one = (n_expert, 2 * n_ff, n_embd), (n_expert, n_ff, n_embd)

    def expert(name: str, shape: tuple[int, ...], hf: str, alias: str, layout: Layout = PLAIN) -> TensorRule:
        return TensorRule(f"{blk}{name}.weight", shape, (moe + hf,), layout, aliases=(((moe + alias,), layout),))

    joint = "input_linear.weight", "experts.gate_up_proj"
    out = [
        expert("ffn_gate_inp", (n_expert, n_embd), "router.layer.weight", "router.weight"),
        expert("ffn_gate_exps", one, *joint, Piece(both, _rows(0, n_ff))),
        expert("ffn_up_exps", one, *joint, Piece(both, _rows(n_ff, 2 * n_ff))),
        expert("ffn_down_exps", (n_expert, n_embd, n_ff), "output_linear.weight", "experts.down_proj"),
    ]
    return out + (shared_mlp_rules(blk, "_shexp", hf + "shared_mlp.", n_ff_shared, n_embd) if n_ff_shared else [])


def shared_mlp_rules(blk: str, suffix: str, hf: str, n_ff: int, n_embd: int) -> list[TensorRule]:
    """Gate, up and down, GGUF names that end with `suffix`, of an MLP with gate and up in one matrix."""
    pair, joint, whole = (n_ff, n_embd), (hf + "input_linear.weight",), (2 * n_ff, n_embd)
    return [
        TensorRule(f"{blk}ffn_gate{suffix}.weight", pair, joint, Piece(whole, _rows(0, n_ff))),
        TensorRule(f"{blk}ffn_up{suffix}.weight", pair, joint, Piece(whole, _rows(n_ff, 2 * n_ff))),
        *matrix(blk, "ffn_down" + suffix, hf + "output_linear", n_embd, n_ff),
    ]


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


def _of_granite_4(config: Config, *, experts: bool) -> bool:
    """Whether a model of Granite 4 has no recurrent layers, and experts or none."""
    return all(attends(config)) and bool(config.get("num_local_experts")) is experts


MAPS = (
    ArchMap(
        arch="granite",
        model_types=("granite", HYBRID),
        architectures=("GraniteForCausalLM", "GraniteMoeHybridForCausalLM"),
        metadata=dense_metadata,
        rules=rules,
        example=dense_example,
        covers=lambda config: config.get("model_type") != HYBRID or _of_granite_4(config, experts=False),
    ),
    ArchMap(
        arch="granitemoe",
        model_types=("granitemoe", "granitemoeshared", HYBRID),
        architectures=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM", "GraniteMoeHybridForCausalLM"),
        metadata=moe_metadata,
        rules=rules,
        example=moe_example,
        covers=lambda config: config.get("model_type") != HYBRID or _of_granite_4(config, experts=True),
    ),
)
