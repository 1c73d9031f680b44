"""`gemma`: Gemma 1. Norm weights are kept as w - 1 in the checkpoint; the head is always tied.

The activation `gelu` of the first configs means the tanh form, as in all of them.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import ATTENTION_BIAS, attention_rules, bias_metadata, mlp_rules
from diffharness.weights.names._config import expect_activation
from diffharness.weights.names._draw import by_width
from diffharness.weights.names._keys import TIED_HEAD, Keys, decoder_example, decoder_metadata, vector
from diffharness.weights.names._map import ADD_ONE, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}


def metadata(config: Config) -> dict[str, Any]:
    expect_activation({**config, "hidden_activation": None}, "gelu_pytorch_tanh", "gelu")
    out = decoder_metadata({**_DEFAULTS, **config}, "gemma", head_dim=256)
    if not out[TIED_HEAD]:
        raise CheckpointError("config.json: expected a tied head, all that Gemma's GGUF form can hold")
    if config.get("use_bidirectional_attention"):
        raise CheckpointError("config.json: expected causal attention, found `use_bidirectional_attention`")
    return out | bias_metadata(config)


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    shape, name = (keys.n_vocab, keys.n_embd), "model.embed_tokens.weight"
    out = [
        # The forward multiplies the embedding by the root of its width.
        TensorRule("token_embd.weight", shape, (name,), draw=by_width(1.0)),
        vector("", "output_norm", "model.norm", keys.n_embd, layout=ADD_ONE),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd, layout=ADD_ONE),
            *attention_rules(metadata, il, bias=metadata.get(ATTENTION_BIAS)),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd, layout=ADD_ONE),
            *mlp_rules(metadata, il),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    gemma: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
    return decoder_example(sizes, "gemma", "GemmaForCausalLM", **gemma)


MAP = ArchMap(
    arch="gemma",
    model_types=("gemma",),
    architectures=("GemmaForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
    ignored=("lm_head.",),  # the embedding again, where a checkpoint has it
)
