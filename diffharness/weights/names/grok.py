"""`grok`: xAI's Grok-1 as `keyfan/grok-1-hf` spells it, and Grok-2's names.

transformers has no such model. Whether the dense MLP of Grok-2 is there, `residual_moe` says; in a GGUF the tensors do.
Grok-2's `rope_type: original` is not read: by the code that xAI names for running it, it is no scaling, while the
engine's converter takes it for YaRN.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import expect_activation, need_float, need_int
from diffharness.weights.names._draw import normal
from diffharness.weights.names._keys import Keys, decoder_config, decoder_example, decoder_metadata, head_rules
from diffharness.weights.names._map import PLAIN, STACK, ArchMap, Config, Draw, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "grok"
_DENSE = "diffharness.residual_moe"  # bool, ours: a dense MLP beside the experts


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "gelu", "gelu_pytorch_tanh")
    if config.get("rope_type") not in (None, "default"):
        raise CheckpointError(f"config.json: `rope_type`: expected none, found {config['rope_type']!r}")
    out = decoder_metadata({"tie_word_embeddings": True, "rms_norm_eps": 1e-5, **config}, _ARCH)
    size = Keys(out).head_dim
    cap = config.get("attn_logit_softcapping", config.get("max_attn_value", 30.0))
    out |= {
        f"{_ARCH}.attn_logit_softcapping": float(cap),
        f"{_ARCH}.router_logit_softcapping": float(config.get("router_logit_softcapping", 30.0)),
        f"{_ARCH}.expert_count": need_int(config, "num_local_experts", "num_experts"),
        f"{_ARCH}.expert_used_count": need_int(config, "num_experts_per_tok"),
        f"{_ARCH}.attention.output_scale": float(config.get("attn_output_multiplier", size**-0.5)),
        f"{_ARCH}.embedding_scale": need_float(config, "embedding_multiplier_scale"),
        f"{_ARCH}.logit_scale": need_float(config, "output_multiplier_scale"),
        _DENSE: bool(config.get("residual_moe", False)),
    }
    if config.get("final_logit_softcapping"):
        out[f"{_ARCH}.final_logit_softcapping"] = need_float(config, "final_logit_softcapping")
    if config.get("moe_intermediate_size"):
        out[f"{_ARCH}.expert_feed_forward_length"] = need_int(config, "moe_intermediate_size")
    if config.get("attn_temperature_len"):
        out[f"{_ARCH}.attention.temperature_length"] = need_int(config, "attn_temperature_len")
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    return decoder_config(metadata, _ARCH) | {
        "architectures": ["Grok1ForCausalLM"],
        "model_type": "grok-1",
        "hidden_act": "gelu",
        "num_local_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": _expert_ff(keys),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 30.0),
        "router_logit_softcapping": keys.get("router_logit_softcapping", 30.0),
        "final_logit_softcapping": keys.get("final_logit_softcapping", 0.0),
        "attn_output_multiplier": keys.get("attention.output_scale", 0.08838834764831845),
        "embedding_multiplier_scale": keys.get("embedding_scale", 78.38367176906169),
        "output_multiplier_scale": keys.get("logit_scale", 0.5773502691896257),
        "attn_temperature_len": keys.get("attention.temperature_length", 0),
        "residual_moe": bool(metadata.get(_DENSE, False)),
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, q, kv = keys.n_embd, keys.n_head * keys.head_dim, keys.n_head_kv * keys.head_dim
    out = [
        _rule("token_embd", (keys.n_vocab, n_embd), "transformer.in_out_embed", "model.embed_tokens", normal(0.05)),
        _rule("output_norm", (n_embd,), "transformer.rms_norm", "model.norm"),
        *head_rules(metadata),
    ]
    for il in range(keys.n_layer):
        blk, one, two = f"blk.{il}.", f"transformer.decoder_layer.{il}.", f"model.layers.{il}."
        mha, attn = one + "multi_head_attention.", two + "self_attn."
        out += [
            _rule(blk + "attn_norm", (n_embd,), one + "rms_norm", two + "pre_attn_norm"),
            _rule(blk + "attn_q", (q, n_embd), mha + "query", attn + "q_proj"),
            _rule(blk + "attn_k", (kv, n_embd), mha + "key", attn + "k_proj"),
            _rule(blk + "attn_v", (kv, n_embd), mha + "value", attn + "v_proj"),
            *(_bias(blk + name, size) for name, size in (("attn_q", q), ("attn_k", kv), ("attn_v", kv))),
            _rule(blk + "attn_output", (n_embd, q), mha + "linear", attn + "o_proj"),
            _rule(blk + "attn_output_norm", (n_embd,), one + "rms_norm_1", two + "post_attn_norm"),
            _rule(blk + "ffn_norm", (n_embd,), one + "rms_norm_2", two + "pre_moe_norm"),
            *_feed_forward_rules(keys, il),
            TensorRule(
                blk + "layer_output_norm.weight",
                (n_embd,),
                (one + "rms_norm_3.weight",),
                required=False,
                synthetic=True,
            ),
            TensorRule(blk + "post_ffw_norm.weight", (n_embd,), (two + "post_moe_norm.weight",), required=False),
        ]
    return out


def _feed_forward_rules(keys: Keys, il: int) -> list[TensorRule]:
    blk, one, two = f"blk.{il}.", f"transformer.decoder_layer.{il}.", f"model.layers.{il}."
    n_embd, n_expert, n_ff = keys.n_embd, keys.n_expert, keys.integer("feed_forward_length")
    n_exp = _expert_ff(keys)
    out = [_rule(blk + "ffn_gate_inp", (n_expert, n_embd), one + "router", two + "block_sparse_moe.gate")]
    parts = (
        ("gate", n_exp, n_embd, "linear", "w1"),
        ("down", n_embd, n_exp, "linear_1", "w2"),
        ("up", n_exp, n_embd, "linear_v", "w3"),
    )
    for part, n_out, n_in, first, second in parts:
        ones = tuple(f"{one}moe.{i}.{first}.weight" for i in range(n_expert))
        twos = tuple(f"{two}block_sparse_moe.experts.{i}.{second}.weight" for i in range(n_expert))
        shape = (n_expert, n_out, n_in)
        out.append(TensorRule(f"{blk}ffn_{part}_exps.weight", shape, ones, STACK, aliases=((twos, STACK),)))
    dense = bool(keys.metadata.get(_DENSE, False))
    for part, n_out, n_in in (("gate", n_ff, n_embd), ("up", n_ff, n_embd), ("down", n_embd, n_ff)):
        names = (f"{two}mlp.{part}_proj.weight",)
        out.append(TensorRule(f"{blk}ffn_{part}.weight", (n_out, n_in), names, required=dense, synthetic=dense))
    return out


def _rule(name: str, shape: tuple[int, ...], one: str, two: str, draw: Draw | None = None) -> TensorRule:
    """A tensor by its name in Grok-1 and in Grok-2."""
    aliases = (((two + ".weight",), PLAIN),)
    return TensorRule(name + ".weight", shape, (one + ".weight",), aliases=aliases, draw=draw)


def _bias(name: str, size: int) -> TensorRule:
    """One that no published model has and some files do."""
    return TensorRule(name + ".bias", (size,), required=False)


def _expert_ff(keys: Keys) -> int:
    return keys.integer("expert_feed_forward_length", 0) or keys.integer("feed_forward_length")


def example(sizes: Sizes) -> dict[str, Any]:
    """All experts are used, so that their weights sum to one, as the engine makes them."""
    return decoder_example(
        sizes,
        "grok-1",
        "Grok1ForCausalLM",
        head_dim=None,
        hidden_act="gelu",
        tie_word_embeddings=True,
        num_local_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert,
        moe_intermediate_size=sizes.n_ff_expert,
        attn_logit_softcapping=2.0,
        router_logit_softcapping=0.0,
        attn_output_multiplier=0.3,
        embedding_multiplier_scale=20.0,
        output_multiplier_scale=2.5,
        residual_moe=False,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("grok-1", "grok"),
    architectures=("Grok1ForCausalLM", "GrokForCausalLM"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    transformers=False,
)
