"""What the maps of Qwen 3 Next and 3.5 share: delta-rule layers, gated attention, experts, further-token blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import expect_activation, need_int, rope_parameters
from diffharness.weights.names._draw import around, by_width
from diffharness.weights.names._keys import TIED_HEAD, Keys, decoder_example, decoder_metadata, head_rules
from diffharness.weights.names._map import ADD_ONE, PLAIN, Config, Layout, Shaped, Sizes, TensorRule
from diffharness.weights.names._moe import expert_rules
from diffharness.weights.source import Metadata

RECURRENT, ATTENTION = "linear_attention", "full_attention"  # config.json's words

# A text model's tensors are under the first prefix; inside an image-and-text model, under the other.
PREFIXES = ("model.", "model.language_model.")

# What the classes assume where a config.json leaves a key out.
DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "rms_norm_eps": 1e-6,
}
_ROTARY_SHARE = 0.25
_INTERVAL = 4
_L2_EPS = 1e-6  # of the norm of queries and keys


# -- keys -----------------------------------------------------------------------------------------------


def next_metadata(config: Config, arch: str) -> dict[str, Any]:
    """The keys of a text model's config, those of experts where it has any."""
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    expect_activation(config, "silu")
    if config.get("num_experts") and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise CheckpointError("config.json: expected experts in every layer, found layers without (mlp_only_layers)")
    dense = need_int(config, "intermediate_size") if config.get("intermediate_size") is not None else None
    out = decoder_metadata({**config, "intermediate_size": dense or 0}, arch)
    if dense is None:
        del out[f"{arch}.feed_forward_length"]
    rope = rope_parameters(config, default_theta=10000.0)
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or _ROTARY_SHARE
    kinds = _layer_kinds(config)
    out |= {
        f"{arch}.rope.dimension_count": int(Keys(out).head_dim * share),
        f"{arch}.ssm.conv_kernel": need_int(config, "linear_conv_kernel_dim"),
        f"{arch}.ssm.state_size": need_int(config, "linear_key_head_dim"),
        f"{arch}.ssm.group_count": need_int(config, "linear_num_key_heads"),
        f"{arch}.ssm.time_step_rank": need_int(config, "linear_num_value_heads"),
        f"{arch}.ssm.inner_size": (
            need_int(config, "linear_value_head_dim") * need_int(config, "linear_num_value_heads")
        ),
        f"{arch}.attention.recurrent_layers": [kind == RECURRENT for kind in kinds],
        f"{arch}.full_attention_interval": _interval(kinds),
    }
    if n_expert := config.get("num_experts"):
        out |= {
            f"{arch}.expert_count": n_expert,
            f"{arch}.expert_used_count": need_int(config, "num_experts_per_tok"),
            f"{arch}.expert_feed_forward_length": need_int(config, "moe_intermediate_size"),
            f"{arch}.expert_shared_feed_forward_length": need_int(config, "shared_expert_intermediate_size"),
        }
        if config.get("norm_topk_prob") is False:
            raise CheckpointError("config.json: expected `norm_topk_prob` true: GGUF's graph always normalises")
    return out


def _layer_kinds(config: Config) -> list[str]:
    """Each layer's kind in config.json's words."""
    n_layer = need_int(config, "num_hidden_layers")
    interval = config.get("full_attention_interval", _INTERVAL)
    listed = config.get("layer_types")
    kinds = list(listed) if listed else [_kind(il, interval) for il in range(n_layer)]
    if len(kinds) != n_layer or not set(kinds) <= {RECURRENT, ATTENTION}:
        raise CheckpointError(
            f"config.json: `layer_types`: expected {n_layer} times {RECURRENT} or {ATTENTION}, found {kinds}"
        )
    return kinds


def _interval(kinds: list[str]) -> int:
    """Of how many layers the last attends; the usual number where layers follow no such rule, which they then say."""
    by_rule = (n for n in range(1, len(kinds) + 1) if kinds == [_kind(il, n) for il in range(len(kinds))])
    return next(by_rule, _INTERVAL)


def _kind(il: int, interval: int) -> str:
    return RECURRENT if (il + 1) % interval else ATTENTION


def next_example(sizes: Sizes, model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    """config.json of a synthetic model, its attention layer not where it usually is.

    The epsilon is the usual one: the norm of queries and keys has that one whatever the others have, and the engine
    knows one for all.
    """
    delta = {
        "layer_types": [ATTENTION if il % 4 == 2 else RECURRENT for il in range(sizes.n_layer)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": _L2_EPS,
    }
    return decoder_example(sizes, model_type, architecture, **(delta | more))


def experts_example(sizes: Sizes) -> dict[str, Any]:
    """The keys of experts."""
    return {
        "num_experts": sizes.n_expert,
        "num_experts_per_tok": sizes.n_expert_used,
        "moe_intermediate_size": sizes.n_ff_expert,
        "shared_expert_intermediate_size": sizes.n_ff_expert // 2,
        "norm_topk_prob": True,
    }


# -- tensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeltaSizes:
    """How large a delta-rule layer's parts are."""

    n_key_head: int
    n_value_head: int
    key_size: int
    value_size: int
    kernel: int

    @classmethod
    def of(cls, keys: Keys) -> DeltaSizes:
        n_value_head = max(1, keys.integer("ssm.time_step_rank"))
        return cls(
            max(1, keys.integer("ssm.group_count")),
            n_value_head,
            keys.integer("ssm.state_size"),
            keys.integer("ssm.inner_size") // n_value_head,
            keys.integer("ssm.conv_kernel"),
        )

    @property
    def n_keys(self) -> int:
        return self.n_key_head * self.key_size

    @property
    def n_values(self) -> int:
        return self.n_value_head * self.value_size

    @property
    def n_conv(self) -> int:
        return 2 * self.n_keys + self.n_values

    @property
    def conv_shape(self) -> Layout:
        return Shaped((self.n_conv, self.kernel), (self.n_conv, 1, self.kernel))


CONV_DRAW = by_width(1.6)
DT_DRAW = around(0.5, 0.8, -3.0)


def is_of_checkpoint(metadata: Metadata) -> bool:
    """Whether the metadata are a config's: a GGUF from elsewhere may keep several matrices as one."""
    return TIED_HEAD in metadata


def n_model_layers(keys: Keys) -> int:
    """Layers of the model; further blocks of the file predict further tokens."""
    return keys.n_layer - keys.integer("nextn_predict_layers", 0)


def is_recurrent(keys: Keys, il: int) -> bool:
    if keys.get("attention.recurrent_layers") is not None:
        return bool(keys.by_layer("attention.recurrent_layers")[il])
    return (il + 1) % max(1, keys.integer("full_attention_interval", _INTERVAL)) != 0


def rule(
    name: str, shape: tuple[int, ...], hf: str, *, layout: Layout = PLAIN, required: bool = True, **more: Any
) -> TensorRule:
    """The rule of one tensor whose Hugging Face name may stand under any of `PREFIXES`."""
    first, *others = ((prefix + hf,) for prefix in PREFIXES)
    return TensorRule(name, shape, first, layout, required, tuple((other, layout) for other in others), **more)


def outer_rules(metadata: Metadata) -> list[TensorRule]:
    """Embedding, final norm and head."""
    keys = Keys(metadata)
    return [
        rule("token_embd.weight", (keys.n_vocab, keys.n_embd), "embed_tokens.weight"),
        rule("output_norm.weight", (keys.n_embd,), "norm.weight", layout=ADD_ONE),
        *head_rules(metadata),
    ]


def norm_rules(blk: str, hf: str, n_embd: int, *, required: bool = True) -> list[TensorRule]:
    """The norms before the mixer and before the feed-forward."""
    names = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    return [
        rule(f"{blk}{gguf}.weight", (n_embd,), f"{hf}{name}.weight", layout=ADD_ONE, required=required)
        for gguf, name in names.items()
    ]


def attention_rules(keys: Keys, blk: str, hf: str, *, required: bool = True) -> list[TensorRule]:
    """Gated attention: of each head the query's rows and then its gate's."""
    n_embd, size = keys.n_embd, keys.head_dim
    q, kv = keys.n_head * size, keys.n_head_kv * size
    out = []
    for name, hf_name, n_out in (("attn_q", "q_proj", 2 * q), ("attn_k", "k_proj", kv), ("attn_v", "v_proj", kv)):
        attn = f"{hf}self_attn.{hf_name}."
        out.append(rule(f"{blk}{name}.weight", (n_out, n_embd), attn + "weight", required=required))
        out.append(rule(f"{blk}{name}.bias", (n_out,), attn + "bias", required=False))
    out.append(rule(f"{blk}attn_output.weight", (n_embd, q), hf + "self_attn.o_proj.weight", required=required))
    out.append(rule(f"{blk}attn_output.bias", (n_embd,), hf + "self_attn.o_proj.bias", required=False))
    for name in ("q", "k"):
        norm = f"{hf}self_attn.{name}_norm.weight"
        out.append(rule(f"{blk}attn_{name}_norm.weight", (size,), norm, layout=ADD_ONE, required=required))
    return out


def dense_rules(keys: Keys, blk: str, hf: str, *, required: bool = True) -> list[TensorRule]:
    """The dense feed-forward."""
    n_embd, n_ff = keys.n_embd, keys.integer("feed_forward_length")
    shapes = {"gate": (n_ff, n_embd), "up": (n_ff, n_embd), "down": (n_embd, n_ff)}
    return [
        rule(f"{blk}ffn_{part}.weight", shape, f"{hf}mlp.{part}_proj.weight", required=required)
        for part, shape in shapes.items()
    ]


def moe_rules(metadata: Metadata, blk: str, hf: str, *, required: bool = True) -> list[TensorRule]:
    """Router, routed experts, and the shared expert with its gate.

    A GGUF may keep gate and up of the experts as one tensor; a checkpoint's are written as two.
    """
    keys = Keys(metadata)
    n_embd, n_expert = keys.n_embd, keys.n_expert
    n_ff = keys.integer("expert_feed_forward_length", 0)
    n_ff = n_ff or keys.integer("feed_forward_length") // max(1, keys.integer("expert_used_count"))
    n_shared = keys.integer("expert_shared_feed_forward_length", 0) or keys.integer("feed_forward_length", 0)
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    either = is_of_checkpoint(metadata)
    out = [TensorRule(blk + "ffn_gate_up_exps.weight", (n_expert, 2 * n_ff, n_embd), required=False)]
    for prefix in PREFIXES:
        mlp = f"{prefix}{hf}mlp."
        found = expert_rules(blk, mlp, names, fused=mlp, n_expert=n_expert, n_ff=n_ff, n_embd=n_embd)
        if prefix == PREFIXES[0]:
            routed = found
        else:
            again = zip(routed, found, strict=True)
            routed = [replace(r, aliases=(*r.aliases, (other.hf, other.layout), *other.aliases)) for r, other in again]
    for one in routed:
        split = one.name.endswith(("gate_exps.weight", "up_exps.weight"))
        out.append(replace(one, required=required and (either or not split), synthetic=required))
    out.append(
        rule(
            blk + "ffn_gate_inp_shexp.weight",
            (n_embd,),
            hf + "mlp.shared_expert_gate.weight",
            layout=Shaped((n_embd,), (1, n_embd)),
            required=required,
            draw=lambda generator, shape: by_width()(generator, (1, *shape)).reshape(shape),
        )
    )
    shapes: Mapping[str, tuple[int, ...]] = {
        "gate": (n_shared, n_embd),
        "up": (n_shared, n_embd),
        "down": (n_embd, n_shared),
    }
    for part, shape in shapes.items():
        hf_name = f"{hf}mlp.shared_expert.{part}_proj.weight"
        out.append(rule(f"{blk}ffn_{part}_shexp.weight", shape, hf_name, required=required))
    return out


def further_rules(metadata: Metadata, *, experts: bool) -> list[TensorRule]:
    """Blocks after the model's layers, which predict further tokens and are never run here."""
    keys = Keys(metadata)
    n_embd, out = keys.n_embd, []
    for at in range(keys.integer("nextn_predict_layers", 0)):
        blk, hf = f"blk.{n_model_layers(keys) + at}.", f"layers.{at}."
        ffn = moe_rules(metadata, blk, hf, required=False) if experts else dense_rules(keys, blk, hf, required=False)
        block = [*norm_rules(blk, hf, n_embd), *attention_rules(keys, blk, hf), *ffn]
        out += [replace(one, required=False, synthetic=False, hf=_of_mtp(one.hf), aliases=()) for one in block]
        own = {
            "eh_proj": ((n_embd, 2 * n_embd), "mtp.fc", PLAIN),
            "enorm": ((n_embd,), "mtp.pre_fc_norm_embedding", ADD_ONE),
            "hnorm": ((n_embd,), "mtp.pre_fc_norm_hidden", ADD_ONE),
            "shared_head_norm": ((n_embd,), "mtp.norm", ADD_ONE),
            "embed_tokens": ((keys.n_vocab, n_embd), "", PLAIN),
            "shared_head_head": ((keys.n_vocab, n_embd), "", PLAIN),
        }
        for name, (shape, hf_name, layout) in own.items():
            parts = (hf_name + ".weight",) if hf_name else ()
            out.append(TensorRule(f"{blk}nextn.{name}.weight", shape, parts, layout, required=False, synthetic=False))
    return out


def _of_mtp(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("mtp." + part.removeprefix(PREFIXES[0]) for part in parts)
