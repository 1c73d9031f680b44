"""Parts of a decoder's list of tensors and keys that several architectures have in the same words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffharness.weights.names._config import need_float
from diffharness.weights.names._keys import TIED_HEAD, Keys, decoder_metadata, matrix
from diffharness.weights.names._map import PLAIN, Config, RotaryPairs, TensorRule
from diffharness.weights.source import Metadata

# Truth values of config.json, which GGUF tells by the tensors alone.
ATTENTION_BIAS = "diffharness.attention_bias"
MLP_BIAS = "diffharness.mlp_bias"


def bias_metadata(config: Config) -> dict[str, Any]:
    """Whether attention and feed-forward have biases, in both cases False where config.json does not say."""
    return {
        ATTENTION_BIAS: bool(config.get("attention_bias", False)),
        MLP_BIAS: bool(config.get("mlp_bias", False)),
    }


def layer_norm_metadata(config: Config, arch: str, eps: str = "layer_norm_eps", **more: Any) -> dict[str, Any]:
    """`decoder_metadata` of a model with LayerNorms, whose epsilon config.json calls `eps`."""
    out = decoder_metadata({**config, "rms_norm_eps": need_float(config, eps)}, arch, **more)
    value = out.pop(f"{arch}.attention.layer_norm_rms_epsilon")
    return out | {f"{arch}.attention.layer_norm_epsilon": value}


def attention_rules(
    metadata: Metadata, il: int, *, permuted: bool = False, bias: bool | None = False, prefix: str = "model."
) -> list[TensorRule]:
    """The four projections of layer `il`; `permuted`: rows of Q and K are interleaved rotary pairs in the GGUF.

    `bias` None means that a file may have biases.
    """
    keys = Keys(metadata)
    blk, hf = f"blk.{il}.", f"{prefix}layers.{il}.self_attn."
    n_embd, n_head, n_head_kv = keys.n_embd, keys.n_head, keys.n_head_kv
    q, kv = n_head * keys.head_dim, n_head_kv * keys.head_dim
    of_q, of_k = (RotaryPairs(n_head), RotaryPairs(n_head_kv)) if permuted else (PLAIN, PLAIN)
    return [
        *matrix(blk, "attn_q", hf + "q_proj", q, n_embd, layout=of_q, bias=bias),
        *matrix(blk, "attn_k", hf + "k_proj", kv, n_embd, layout=of_k, bias=bias),
        *matrix(blk, "attn_v", hf + "v_proj", kv, n_embd, bias=bias),
        *matrix(blk, "attn_output", hf + "o_proj", n_embd, q, bias=bias),
    ]


def mlp_rules(metadata: Metadata, il: int, *, bias: bool | None = False, prefix: str = "model.") -> list[TensorRule]:
    """Gate, up and down of the dense feed-forward of layer `il`."""
    keys = Keys(metadata)
    blk, hf = f"blk.{il}.", f"{prefix}layers.{il}.mlp."
    n_embd, n_ff = keys.n_embd, keys.integer("feed_forward_length")
    return [
        *matrix(blk, "ffn_gate", hf + "gate_proj", n_ff, n_embd, bias=bias),
        *matrix(blk, "ffn_up", hf + "up_proj", n_ff, n_embd, bias=bias),
        *matrix(blk, "ffn_down", hf + "down_proj", n_embd, n_ff, bias=bias),
    ]


def fused_or_not(metadata: Metadata, form: list[TensorRule], other: list[TensorRule]) -> list[TensorRule]:
    """Rules where a GGUF keeps the same weights in one `form` or in an `other`, fused or apart.

    The converter's is the first, and a checkpoint's model has it. Which of the two an artifact has its metadata do not
    tell, so that neither is required of it.
    """
    if TIED_HEAD in metadata:
        return form
    return [replace(rule, required=False) for rule in (*form, *other)]


def moved(rules: list[TensorRule], to: str, *others: str) -> list[TensorRule]:
    """The same rules with Hugging Face names that begin with `model.` begin with `to`; spelled, too, as `others`."""
    return [_moved(rule, to, others) for rule in rules]


def _moved(rule: TensorRule, to: str, others: tuple[str, ...]) -> TensorRule:
    def under(prefix: str, parts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prefix + part.removeprefix("model.") if part.startswith("model.") else part for part in parts)

    spellings = [(rule.hf, rule.layout), *rule.aliases]
    aliases = {(under(prefix, parts), layout): None for parts, layout in spellings for prefix in (to, *others)}
    first = (under(to, rule.hf), rule.layout)
    return replace(rule, hf=first[0], aliases=tuple(alias for alias in aliases if alias != first))
