"""`command-r` and `cohere2`: Cohere's decoders. Rows as Hugging Face has them; no norm before the feed-forward.

The head is always tied: GGUF has no place for another. Cohere 2's pattern of sliding layers is written only where it is
not the format's own (every fourth layer is global).
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import (
    ATTENTION_BIAS,
    attention_rules,
    bias_metadata,
    layer_norm_metadata,
    mlp_rules,
)
from diffharness.weights.names._config import expect_activation, need_float, need_int, rope_parameters
from diffharness.weights.names._draw import NORM
from diffharness.weights.names._keys import Keys, decoder_example, embedding_rules, vector
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._sliding import SLIDING, by_period
from diffharness.weights.source import Metadata

PERIOD = 4
DEFAULTS: dict[str, Any] = {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True}
NORMS_OF_HEADS = "diffharness.norms_of_heads"  # bool: queries and keys are normalised; GGUF tells by the tensors


def metadata(config: Config) -> dict[str, Any]:
    out = cohere_metadata(config, "command-r", default_theta=500000.0)
    if (size := config.get("head_dim")) not in (None, Keys(out).head_dim):
        raise CheckpointError(f"config.json: `head_dim`: expected width / heads, {Keys(out).head_dim}, found {size!r}")
    if config.get("model_max_length"):  # a longer context than the one that the config names
        out["command-r.context_length"] = need_int(config, "model_max_length")
    return out | {NORMS_OF_HEADS: bool(config.get("use_qk_norm", False))}


def cohere_metadata(config: Config, arch: str, *, default_theta: float) -> dict[str, Any]:
    """The keys that both write."""
    expect_activation(config, "silu")
    complete = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    complete.pop("head_dim", None)  # width / heads, whatever is said
    if not complete["tie_word_embeddings"]:
        raise CheckpointError("config.json: expected a tied head, all that Cohere's GGUF form can hold")
    if (kind := rope_parameters(complete, default_theta=default_theta)["rope_type"]) != "default":
        raise CheckpointError(f"config.json: expected plain rope in a Cohere model, found {kind!r}")
    out = layer_norm_metadata(complete, arch, default_theta=default_theta)
    return out | {
        f"{arch}.logit_scale": need_float(complete, "logit_scale"),
        f"{arch}.rope.scaling.type": "none",
        **bias_metadata(config),
    }


def cohere2_metadata(config: Config) -> dict[str, Any]:
    out = cohere_metadata(config, "cohere2", default_theta=10000.0)
    if config.get("rotary_pct", 1.0) != 1.0:
        raise CheckpointError(f"config.json: `rotary_pct`: expected 1, found {config['rotary_pct']!r}")
    out["cohere2.attention.sliding_window"] = need_int({"sliding_window": 4096, **config}, "sliding_window")
    out["cohere2.rope.dimension_count"] = Keys(out).head_dim
    n_layer = need_int(config, "num_hidden_layers")
    kinds = config.get("layer_types") or by_period(n_layer, int(config.get("sliding_window_pattern") or PERIOD))
    if list(kinds) != by_period(n_layer, PERIOD):
        out["cohere2.attention.sliding_window_pattern"] = [kind == SLIDING for kind in kinds]
    return out


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    bias, norms = metadata.get(ATTENTION_BIAS), metadata.get(NORMS_OF_HEADS)
    out = [rule for rule in embedding_rules(metadata) if rule.name != "output.weight"]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *attention_rules(metadata, il, bias=bias),
            *mlp_rules(metadata, il),
        ]
        if norms is not False and metadata["general.architecture"] == "command-r":
            out += [
                TensorRule(
                    f"{blk}attn_{x}_norm.weight",
                    (n_head, keys.head_dim),
                    (f"{hf}self_attn.{x}_norm.weight",),
                    required=bool(norms),
                    draw=NORM,
                )
                for x, n_head in (("q", keys.n_head), ("k", keys.n_head_kv))
            ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return cohere_example(sizes, "cohere", "CohereForCausalLM")


def cohere_example(sizes: Sizes, model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    norms = {"rms_norm_eps": None, "layer_norm_eps": 1e-3}
    scales = {"logit_scale": 0.4, "tie_word_embeddings": True}
    return decoder_example(sizes, model_type, architecture, **({"head_dim": None} | norms | scales | more))


def cohere2_example(sizes: Sizes) -> dict[str, Any]:
    return cohere_example(sizes, "cohere2", "Cohere2ForCausalLM", sliding_window=sizes.window, rotary_pct=1.0)


TIED = ("lm_head.",)  # the embedding again, where a checkpoint has it

MAPS = (
    ArchMap(
        arch="command-r",
        model_types=("cohere",),
        architectures=("CohereForCausalLM",),
        metadata=metadata,
        rules=rules,
        example=example,
        ignored=TIED,
    ),
    ArchMap(
        arch="cohere2",
        model_types=("cohere2",),
        architectures=("Cohere2ForCausalLM",),
        metadata=cohere2_metadata,
        rules=rules,
        example=cohere2_example,
        ignored=TIED,
    ),
)
