"""What the GLM architectures share: biases of queries, keys and values alone, heads turned in part, a fused MLP."""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._blocks import ATTENTION_BIAS
from diffharness.weights.names._config import expect_activation
from diffharness.weights.names._gpt import rotated_share
from diffharness.weights.names._keys import Keys, decoder_config, decoder_metadata, matrix
from diffharness.weights.names._map import Config, TensorRule
from diffharness.weights.source import Metadata

_SHARE = 0.5  # of a head's components turns, where config.json does not say


def glm_metadata(config: Config, arch: str, *, bias: bool, head_dim: int | None = None) -> dict[str, Any]:
    """The keys of a decoder with partly turned heads; `bias` is `attention_bias` where config.json has none."""
    expect_activation(config, "silu")
    out = decoder_metadata(config, arch, head_dim=head_dim)
    out[f"{arch}.rope.dimension_count"] = int(Keys(out).head_dim * rotated_share(config, _SHARE))
    out[ATTENTION_BIAS] = bool(config.get("attention_bias", bias))
    return out


def glm_config(metadata: Metadata, arch: str) -> dict[str, Any]:
    """config.json's keys of such a decoder."""
    keys = Keys(metadata)
    return decoder_config(metadata, arch) | {
        "hidden_act": "silu",
        "attention_bias": bool(metadata.get(ATTENTION_BIAS, False)),
        "partial_rotary_factor": keys.integer("rope.dimension_count", keys.head_dim) / keys.head_dim,
    }


def fused_mlp(keys: Keys, blk: str, up: str, down: str) -> list[TensorRule]:
    """A gated MLP whose gate and up are one matrix, the gate's rows first."""
    n_embd, n_ff = keys.n_embd, keys.integer("feed_forward_length")
    return [
        *matrix(blk, "ffn_up", up, 2 * n_ff, n_embd),
        *matrix(blk, "ffn_down", down, n_embd, n_ff),
    ]
