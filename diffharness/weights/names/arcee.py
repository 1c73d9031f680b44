"""`arcee`: AFM. Llama's tensors without a gate."""

from __future__ import annotations

from typing import Any

from diffharness.weights.names import llama
from diffharness.weights.names._config import expect_activation
from diffharness.weights.names._keys import Keys, decoder_config, decoder_example, decoder_metadata
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "arcee"


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "relu2")
    out = decoder_metadata(config, _ARCH)
    out[f"{_ARCH}.rope.dimension_count"] = Keys(out).head_dim
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["ArceeForCausalLM"], "model_type": "arcee", "hidden_act": "relu2"}
    return named | decoder_config(metadata, _ARCH)


def rules(metadata: Metadata) -> list[TensorRule]:
    return [rule for rule in llama.rules(metadata) if ".ffn_gate." not in rule.name]


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "arcee", "ArceeForCausalLM", hidden_act="relu2")


MAP = ArchMap(
    arch=_ARCH,
    model_types=("arcee",),
    architectures=("ArceeForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
