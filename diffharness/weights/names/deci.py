"""`deci`: DeciLM and Llama-Nemotron, as the published code has it. Llama's tensors, where a layer has them.

config.json describes each layer in `block_configs`, or only its KV heads in `num_key_value_heads_per_layer` (DeciLM).
A feed-forward that is one matrix, windows, and other mixers than attention have no GGUF form and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import gated_matrices
from diffharness.weights.names._config import expect_activation, need_float, need_int
from diffharness.weights.names._keys import (
    Keys,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    matrix,
    rope_freqs_rule,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, RotaryPairs, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "deci"
_FF_MULTIPLE = 256  # widths of feed-forwards are rounded up to a multiple of it
_ATTENTION_KEYS = {"n_heads_in_group", "no_op", "replace_with_linear"}
_FFN_KEYS = {"ffn_mult", "no_op", "hidden_act"}


@dataclass(frozen=True)
class _Block:
    """One layer: heads (0: no attention), KV heads (0: attention is one matrix) and width (0: no feed-forward)."""

    n_head: int
    n_head_kv: int
    n_ff: int


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    blocks = _blocks(config)
    out = decoder_metadata({**config, "intermediate_size": 0}, _ARCH)
    size = Keys(out).head_dim
    return out | {
        f"{_ARCH}.attention.head_count": [block.n_head for block in blocks],
        f"{_ARCH}.attention.head_count_kv": [block.n_head_kv for block in blocks],
        f"{_ARCH}.feed_forward_length": [block.n_ff for block in blocks],
        f"{_ARCH}.attention.key_length": size,
        f"{_ARCH}.attention.value_length": size,
        f"{_ARCH}.rope.dimension_count": size,
    }


def _blocks(config: Config) -> list[_Block]:
    n_layer, n_head = need_int(config, "num_hidden_layers"), need_int(config, "num_attention_heads")
    if described := config.get("block_configs"):
        blocks = [_block(block, n_head, need_int(config, "hidden_size")) for block in described]
    else:
        n_ff, n_head_kv = need_int(config, "intermediate_size"), config.get("num_key_value_heads") or n_head
        by_layer = config.get("num_key_value_heads_per_layer") or [n_head_kv] * n_layer
        blocks = [_Block(n_head, kv, n_ff) for kv in by_layer]
    if len(blocks) != n_layer:
        raise CheckpointError(f"config.json: expected {n_layer} layers described, found {len(blocks)}")
    return blocks


def _block(block: Mapping[str, Any], n_head: int, n_embd: int) -> _Block:
    attention, ffn = block["attention"], block["ffn"]
    for part, known in ((attention, _ATTENTION_KEYS), (ffn, _FFN_KEYS)):
        unknown = sorted(key for key, value in part.items() if value and key not in known)
        if unknown:
            raise CheckpointError(f"config.json: `block_configs`: expected plain layers, found `{unknown[0]}`")
    n_ff = 0 if ffn.get("no_op") or ffn.get("ffn_mult") is None else _width(need_float(ffn, "ffn_mult"), n_embd)
    if attention.get("no_op"):
        return _Block(0, 0, n_ff)
    if attention.get("replace_with_linear"):
        return _Block(n_head, 0, n_ff)
    return _Block(n_head, n_head // need_int(attention, "n_heads_in_group"), n_ff)


def _width(multiplier: float, n_embd: int) -> int:
    """Two thirds of `multiplier` times the model's width, rounded up."""
    return -(-int(2 * multiplier * n_embd / 3) // _FF_MULTIPLE) * _FF_MULTIPLE


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd = keys.n_embd
    n_head = keys.by_layer("attention.head_count")
    n_head_kv = keys.by_layer("attention.head_count_kv", n_head[0])
    n_ff = keys.by_layer("feed_forward_length")
    out = [*embedding_rules(metadata), rope_freqs_rule(metadata, keys.integer("rope.dimension_count", keys.head_dim))]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        if n_head[il]:
            out.append(vector(blk, "attn_norm", hf + "input_layernorm", n_embd))
        if n_head_kv[il]:
            out += _attention(keys, blk, hf + "self_attn.", n_head[il], n_head_kv[il])
        elif n_head[il]:
            out += matrix(blk, "attn_output", hf + "self_attn.linear_attn", n_embd, n_embd)
        if n_ff[il]:
            out += [
                vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
                *gated_matrices(blk, hf + "mlp.", n_ff[il], n_embd, bias=None),
            ]
    return out


def _attention(keys: Keys, blk: str, hf: str, n_head: int, n_head_kv: int) -> list[TensorRule]:
    n_embd, size = keys.n_embd, keys.head_dim
    q, kv = RotaryPairs(n_head), RotaryPairs(n_head_kv)
    return [
        *matrix(blk, "attn_q", hf + "q_proj", n_head * size, n_embd, layout=q, bias=None),
        *matrix(blk, "attn_k", hf + "k_proj", n_head_kv * size, n_embd, layout=kv, bias=None),
        *matrix(blk, "attn_v", hf + "v_proj", n_head_kv * size, n_embd, bias=None),
        *matrix(blk, "attn_output", hf + "o_proj", n_embd, n_head * size, bias=None),
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    """A layer of each kind that released models have, with attention and feed-forward of several sizes.

    The layer that lacks both is not among them: the engine builds nothing that could be compared.
    """

    def block(group: int | None, mult: float | None, *, linear: bool = False) -> dict[str, Any]:
        attention = {"n_heads_in_group": group, "no_op": group is None and not linear, "replace_with_linear": linear}
        return {"attention": attention, "ffn": {"ffn_mult": mult, "no_op": mult is None}}

    wide = 2.0 * _FF_MULTIPLE * 3 / (2 * sizes.n_embd)  # twice the least width
    share = sizes.n_head // sizes.n_head_kv
    blocks = [block(share, wide / 2), block(None, wide), block(sizes.n_head, wide), block(None, wide / 2, linear=True)]
    blocks += [block(1, wide / 2)] * (sizes.n_layer - len(blocks))
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    own: dict[str, Any] = {
        "num_hidden_layers": len(blocks),
        "head_dim": None,
        "num_key_value_heads": None,
        "intermediate_size": None,
    }
    return decoder_example(
        sizes, "nemotron-nas", "DeciLMForCausalLM", block_configs=blocks, rope_scaling=scaling, **own
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("nemotron-nas", "deci"),
    architectures=("DeciLMForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
    transformers=False,
)
