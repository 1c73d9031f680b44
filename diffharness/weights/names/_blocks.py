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


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


def attention_matrices(
    keys: Keys,
    blk: str,
    hf: str,
    names: tuple[str, str, str, str] = ATTENTION,
    *,
    permuted: bool = False,
    bias: bool | None = None,
    out_bias: bool | None = False,
) -> list[TensorRule]:
    """Projections of queries, keys and values and of the heads' output: `names` below the Hugging Face prefix `hf`.

    `blk` is the GGUF prefix (`blk.3.`); `permuted`: rows of Q and K are interleaved rotary pairs in the GGUF. Biases
    are there, are not (False), or may be there (None).
    """
    n_embd, n_head, n_head_kv = keys.n_embd, keys.n_head, keys.n_head_kv
    q, kv = n_head * keys.head_dim, n_head_kv * keys.head_dim
    of_q, of_k = (RotaryPairs(n_head), RotaryPairs(n_head_kv)) if permuted else (PLAIN, PLAIN)
    return [
        *matrix(blk, "attn_q", hf + names[0], q, n_embd, layout=of_q, bias=bias),
        *matrix(blk, "attn_k", hf + names[1], kv, n_embd, layout=of_k, bias=bias),
        *matrix(blk, "attn_v", hf + names[2], kv, n_embd, bias=bias),
        *matrix(blk, "attn_output", hf + names[3], n_embd, q, bias=out_bias),
    ]


def gated_matrices(
    blk: str,
    hf: str,
    n_ff: int,
    n_embd: int,
    names: tuple[str, str, str] = GATED,
    *,
    suffix: str = "",
    bias: bool | None = False,
) -> list[TensorRule]:
    """Gate, up and down of a gated MLP: `names` below `hf`, GGUF names that end with `suffix` (`_shexp`)."""
    gate, up, down = names
    return [
        *matrix(blk, "ffn_gate" + suffix, hf + gate, n_ff, n_embd, bias=bias),
        *matrix(blk, "ffn_up" + suffix, hf + up, n_ff, n_embd, bias=bias),
        *matrix(blk, "ffn_down" + suffix, hf + down, n_embd, n_ff, bias=bias),
    ]


def attention_rules(
    metadata: Metadata, il: int, *, permuted: bool = False, bias: bool | None = False
) -> list[TensorRule]:
    """`attention_matrices` of layer `il` under the usual names; `bias` is that of all four."""
    hf = f"model.layers.{il}.self_attn."
    return attention_matrices(Keys(metadata), f"blk.{il}.", hf, permuted=permuted, bias=bias, out_bias=bias)


def mlp_rules(metadata: Metadata, il: int, *, bias: bool | None = False) -> list[TensorRule]:
    """`gated_matrices` of layer `il` under the usual names, as wide as every layer's feed-forward."""
    keys = Keys(metadata)
    n_ff = keys.integer("feed_forward_length")
    return gated_matrices(f"blk.{il}.", f"model.layers.{il}.mlp.", n_ff, keys.n_embd, bias=bias)


def fused_or_not(metadata: Metadata, form: list[TensorRule], other: list[TensorRule]) -> list[TensorRule]:
    """Rules where a GGUF keeps the same weights in one `form` or in an `other`, fused or apart.

    The converter's is the first, and a checkpoint's model has it. Which of the two an artifact has its metadata do not
    tell, so that neither is required of it.
    """
    if TIED_HEAD in metadata:
        return form
    return [replace(rule, required=False) for rule in (*form, *other)]
