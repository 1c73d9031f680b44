"""Tensors that Qwen 3 Next and 3.5 have alike: gated attention, feed-forwards, blocks that predict further tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffharness.weights.names._blocks import fused_or_not
from diffharness.weights.names._draw import around, by_width
from diffharness.weights.names._keys import Keys, head_rules
from diffharness.weights.names._map import ADD_ONE, PLAIN, Layout, Shaped, TensorRule
from diffharness.weights.names._moe import PROJECTIONS, expert_rules
from diffharness.weights.names._qwen_next import INTERVAL
from diffharness.weights.names._shared_experts import expert_width, n_main_layers
from diffharness.weights.source import Metadata

# A text model's tensors are under the first prefix; inside an image-and-text model, under the other.
PREFIXES = ("model.", "model.language_model.")
CONV_DRAW = by_width(1.6)
DT_DRAW = around(0.5, 0.8, -3.0)


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


def is_recurrent(keys: Keys, il: int) -> bool:
    if keys.get("attention.recurrent_layers") is not None:
        return bool(keys.by_layer("attention.recurrent_layers")[il])
    return (il + 1) % max(1, keys.integer("full_attention_interval", INTERVAL)) != 0


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


def norm_rules(blk: str, hf: str, n_embd: int) -> list[TensorRule]:
    """The norms before the mixer and before the feed-forward."""
    names = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    return [
        rule(f"{blk}{gguf}.weight", (n_embd,), f"{hf}{name}.weight", layout=ADD_ONE) for gguf, name in names.items()
    ]


def attention_rules(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    """Gated attention: of each head the query's rows and then its gate's."""
    n_embd, size = keys.n_embd, keys.head_dim
    q, kv = keys.n_head * size, keys.n_head_kv * size
    out = []
    for name, hf_name, n_out in (("attn_q", "q_proj", 2 * q), ("attn_k", "k_proj", kv), ("attn_v", "v_proj", kv)):
        attn = f"{hf}self_attn.{hf_name}."
        out.append(rule(f"{blk}{name}.weight", (n_out, n_embd), attn + "weight"))
        out.append(rule(f"{blk}{name}.bias", (n_out,), attn + "bias", required=False))
    out.append(rule(f"{blk}attn_output.weight", (n_embd, q), hf + "self_attn.o_proj.weight"))
    out.append(rule(f"{blk}attn_output.bias", (n_embd,), hf + "self_attn.o_proj.bias", required=False))
    for name in ("q", "k"):
        norm = f"{hf}self_attn.{name}_norm.weight"
        out.append(rule(f"{blk}attn_{name}_norm.weight", (size,), norm, layout=ADD_ONE))
    return out


def dense_rules(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    """The dense feed-forward."""
    n_embd, n_ff = keys.n_embd, keys.integer("feed_forward_length")
    shapes = {"gate": (n_ff, n_embd), "up": (n_ff, n_embd), "down": (n_embd, n_ff)}
    return [rule(f"{blk}ffn_{part}.weight", shape, f"{hf}mlp.{part}_proj.weight") for part, shape in shapes.items()]


def moe_rules(metadata: Metadata, blk: str, hf: str) -> list[TensorRule]:
    """Router, routed experts, and the shared expert with its gate.

    A GGUF may keep gate and up of the experts as one tensor; a checkpoint's are written as two.
    """
    keys = Keys(metadata)
    n_embd, n_expert = keys.n_embd, keys.n_expert
    n_ff = expert_width(keys, 0)
    n_shared = keys.integer("expert_shared_feed_forward_length", 0) or keys.integer("feed_forward_length", 0)
    routed: list[TensorRule] = []
    for prefix in PREFIXES:
        mlp = f"{prefix}{hf}mlp."
        found = expert_rules(blk, mlp, PROJECTIONS, fused=mlp, n_expert=n_expert, n_ff=n_ff, n_embd=n_embd)
        if routed:
            both = zip(routed, found, strict=True)
            found = [replace(r, aliases=(*r.aliases, (other.hf, other.layout), *other.aliases)) for r, other in both]
        routed = found
    router, *halves, down = routed
    fused = TensorRule(blk + "ffn_gate_up_exps.weight", (n_expert, 2 * n_ff, n_embd))
    out = [router, *fused_or_not(metadata, halves, [fused]), down]
    out.append(
        rule(
            blk + "ffn_gate_inp_shexp.weight",
            (n_embd,),
            hf + "mlp.shared_expert_gate.weight",
            layout=Shaped((n_embd,), (1, n_embd)),
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
        out.append(rule(f"{blk}ffn_{part}_shexp.weight", shape, hf_name))
    return out


def further_rules(metadata: Metadata, *, experts: bool) -> list[TensorRule]:
    """Blocks after the model's layers, which predict further tokens and are never run here."""
    keys = Keys(metadata)
    n_embd, out = keys.n_embd, []
    for at in range(keys.integer("nextn_predict_layers", 0)):
        blk, hf = f"blk.{n_main_layers(keys) + at}.", f"layers.{at}."
        ffn = moe_rules(metadata, blk, hf) if experts else dense_rules(keys, blk, hf)
        block = [*norm_rules(blk, hf, n_embd), *attention_rules(keys, blk, hf), *ffn]
        out += [replace(one, required=False, synthetic=False, hf=_of_mtp(one.hf), aliases=()) for one in block]
        own: dict[str, tuple[tuple[int, ...], str, Layout]] = {
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
