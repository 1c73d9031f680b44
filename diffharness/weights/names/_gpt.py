"""Hyperparameters and tensors that decoders with LayerNorms share: GPT-2, GPT-NeoX, BLOOM, MPT, Falcon, Phi and kin.

Keys under `diffharness.` are ours: what config.json says of these models and GGUF has no key for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_float, rope_metadata, rope_parameters
from diffharness.weights.names._keys import TIED_HEAD, matrix
from diffharness.weights.names._map import PLAIN, Config, Layout, TensorRule
from diffharness.weights.source import Float32Array, Metadata

ACTIVATION = "diffharness.activation"  # which GELU, in ggml's words
QKV_BIAS = "diffharness.qkv_bias"  # bool: queries, keys and values have biases

_GELUS = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
}
_MOST_LAYERS = 256  # for which buffers are named that are not weights


@dataclass(frozen=True)
class Woven:
    """Queries, keys and values of one matrix, KV head by KV head: its query heads, its key, its value.

    GGUF has all queries, then all keys, then all values. Applies to weights and biases.
    """

    n_head: int
    n_head_kv: int
    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        [rows] = parts
        group = self.n_head // self.n_head_kv
        woven = rows.reshape(self.n_head_kv, group + 2, -1, *rows.shape[1:])
        pieces = (woven[:, :group], woven[:, group], woven[:, group + 1])
        return np.concatenate([piece.reshape(-1, *rows.shape[1:]) for piece in pieces])

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        rest, group = tensor.shape[1:], self.n_head // self.n_head_kv
        size = len(tensor) // (self.n_head + 2 * self.n_head_kv)
        heads = tensor.reshape(-1, size, *rest)
        q, k, v = np.split(heads, [self.n_head, self.n_head + self.n_head_kv])
        q = q.reshape(self.n_head_kv, group, size, *rest)
        return [np.concatenate((q, k[:, None], v[:, None]), axis=1).reshape(tensor.shape)]


# -- hyperparameters ------------------------------------------------------------------------------------


def gpt_metadata(
    arch: str,
    *,
    n_layer: int,
    n_ctx: int,
    n_embd: int,
    n_ff: int,
    n_head: int,
    n_head_kv: int | None,
    eps: float,
    n_vocab: int,
    tied: bool,
    eps_key: str = "layer_norm_epsilon",
) -> dict[str, Any]:
    """The keys that each of these models has; `n_head_kv` None leaves its key out."""
    out: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        f"{arch}.context_length": n_ctx,
        f"{arch}.embedding_length": n_embd,
        f"{arch}.feed_forward_length": n_ff,
        f"{arch}.block_count": n_layer,
        f"{arch}.attention.head_count": n_head,
        f"{arch}.attention.{eps_key}": eps,
        f"{arch}.vocab_size": n_vocab,
        TIED_HEAD: tied,
    }
    return out if n_head_kv is None else out | {f"{arch}.attention.head_count_kv": n_head_kv}


def gelu_of(config: Config, key: str, default: str) -> str:
    """ggml's name of the GELU that `key` names; CheckpointError for any other activation."""
    name = config.get(key) or default
    if name not in _GELUS:
        raise CheckpointError(f"config.json: `{key}`: expected one of {', '.join(_GELUS)}, found {name!r}")
    return _GELUS[name]


def expect_tanh_gelu(config: Config, key: str, default: str) -> None:
    """CheckpointError unless the activation is GELU in its tanh form."""
    if gelu_of(config, key, default) != "gelu":
        raise CheckpointError(f"config.json: `{key}`: expected GELU in its tanh form, found {config[key]!r}")


def rope_keys(arch: str, config: Config, *, written: bool = True) -> dict[str, Any]:
    """GGUF keys of the rotary embedding; unless `written`, a base of 10000 is left out, as the converter does."""
    out = rope_metadata(arch, rope_parameters(config, default_theta=10000.0))
    if not written and out[f"{arch}.rope.freq_base"] == 10000.0:
        del out[f"{arch}.rope.freq_base"]
    return out


def rotated_share(config: Config, default: float, *keys: str) -> float:
    """Which share of a head is turned: `partial_rotary_factor`, in either place, or one of `keys`."""
    places: tuple[Config, ...] = (config.get("rope_parameters") or {}, config.get("rope_scaling") or {}, config)
    for place in places:
        for key in ("partial_rotary_factor", *keys):
            if place.get(key) is not None:
                return need_float(place, key)
    return default


# -- tensors --------------------------------------------------------------------------------------------


def affine(
    blk: str, gguf: str, hf: str, size: int, *, layout: Layout = PLAIN, bias: bool | None = True
) -> list[TensorRule]:
    """A LayerNorm's weight (in `layout`) and bias: required, none (False), or may be there (None)."""
    rules = [TensorRule(f"{blk}{gguf}.weight", (size,), (hf + ".weight",), layout)]
    if bias is not False:
        rules.append(TensorRule(f"{blk}{gguf}.bias", (size,), (hf + ".bias",), required=bool(bias)))
    return rules


def fused_qkv(
    metadata: Metadata,
    blk: str,
    hf: str,
    sizes: tuple[int, int, int],
    n_embd: int,
    *,
    layout: Layout,
    bias: bool | None,
) -> list[TensorRule]:
    """`attn_qkv`, queries, keys and values of `sizes` rows; a file may have three matrices in its place."""
    rules = matrix(blk, "attn_qkv", hf, sum(sizes), n_embd, layout=layout, bias=bias)
    if TIED_HEAD in metadata:
        return rules
    three = [
        rule
        for name, n in zip(("attn_q", "attn_k", "attn_v"), sizes, strict=True)
        for rule in matrix(blk, name, "", n, n_embd, bias=None)
    ]
    return optional(rules) + [replace(rule, hf=()) for rule in optional(three)]


def separate_qkv(
    metadata: Metadata, blk: str, hf: str, sizes: tuple[int, int, int], n_embd: int, *, bias: bool | None
) -> list[TensorRule]:
    """`attn_q`, `attn_k` and `attn_v` of `sizes` rows; a file may have one matrix in their place."""
    rules = [
        rule
        for name, n in zip("qkv", sizes, strict=True)
        for rule in matrix(blk, f"attn_{name}", f"{hf}{name}_proj", n, n_embd, bias=bias)
    ]
    if TIED_HEAD in metadata:
        return rules
    one = matrix(blk, "attn_qkv", "", sum(sizes), n_embd, bias=None)
    return optional(rules) + [replace(rule, hf=()) for rule in optional(one)]


def optional(rules: list[TensorRule]) -> list[TensorRule]:
    """The same tensors, none of which must be there."""
    return [replace(rule, required=False) for rule in rules]


def also_spelled(rules: list[TensorRule], respell: Callable[[str], str]) -> list[TensorRule]:
    """The same tensors, which a checkpoint may also call as `respell` says of each name."""
    return [
        replace(rule, aliases=(*rule.aliases, (tuple(respell(name) for name in rule.hf), rule.layout)))
        if rule.hf and any(respell(name) != name for name in rule.hf)
        else rule
        for rule in rules
    ]


def buffers(prefixes: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Names of what old checkpoints keep in each layer beside weights, such as the causal mask."""
    return tuple(f"{prefix}{il}.{name}" for prefix in prefixes for il in range(_MOST_LAYERS) for name in names)
