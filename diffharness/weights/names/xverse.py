"""`xverse`: XVERSE 7B, 13B and 65B, as the published code has it. Llama's tensors.

A scaled rope is refused where GGUF has no words for it (`dynamic`).
"""

from __future__ import annotations

from typing import Any

from diffharness.weights.names import llama
from diffharness.weights.names._config import expect_activation
from diffharness.weights.names._keys import Keys, decoder_config, decoder_example, decoder_metadata
from diffharness.weights.names._map import ArchMap, Config, Sizes
from diffharness.weights.source import Metadata

_ARCH = "xverse"


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    out = decoder_metadata(config, _ARCH)
    out[f"{_ARCH}.rope.dimension_count"] = Keys(out).head_dim
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["XverseForCausalLM"], "model_type": "xverse", "hidden_act": "silu"}
    return named | decoder_config(metadata, _ARCH)


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "xverse", "XverseForCausalLM", head_dim=None)


MAP = ArchMap(
    arch=_ARCH,
    model_types=("xverse",),
    architectures=("XverseForCausalLM",),
    metadata=metadata,
    config=config,
    rules=llama.rules,
    example=example,
    transformers=False,
)
