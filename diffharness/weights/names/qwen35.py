"""`qwen35`, `qwen35moe`: Qwen 3.5 and 3.6, dense and with experts.

Qwen 3 Next's tensors with every projection of a delta-rule layer by itself. Where value heads outnumber key heads, GGUF
has them in another order: the checkpoint keeps the heads of one key head together, GGUF the first of each key head,
then the second. Checkpoints of the image-and-text models have the text model's config as a part of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from diffharness.weights.names._config import rope_parameters
from diffharness.weights.names._keys import TIED_HEAD, Keys
from diffharness.weights.names._map import PLAIN, ArchMap, Config, Layout, Sizes, TensorRule
from diffharness.weights.names._qwen_next import experts_example, next_example, next_metadata
from diffharness.weights.names._qwen_next_tensors import (
    CONV_DRAW,
    DT_DRAW,
    DeltaSizes,
    attention_rules,
    dense_rules,
    further_rules,
    is_recurrent,
    moe_rules,
    norm_rules,
    outer_rules,
    rule,
)
from diffharness.weights.names._reorder import MINUS_EXP, Chained, Tiled, decays
from diffharness.weights.names._shared_experts import n_main_layers
from diffharness.weights.source import Metadata

_SECTIONS = [11, 11, 10]  # pairs that turn by time, height and width, where a config does not say


def metadata(arch: str, config: Config) -> dict[str, Any]:
    text = config.get("text_config") or config
    out = next_metadata(text, arch)
    if "tie_word_embeddings" in config:
        out[TIED_HEAD] = bool(config["tie_word_embeddings"])
    sections = rope_parameters(text, default_theta=10000.0).get("mrope_section") or _SECTIONS
    out[f"{arch}.rope.dimension_sections"] = [*sections, 0][:4]
    return out


def rules(experts: bool, metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    out = outer_rules(metadata)
    for il in range(n_main_layers(keys)):
        blk, hf = f"blk.{il}.", f"layers.{il}."
        mixer = _delta_rules(keys, blk, hf) if is_recurrent(keys, il) else attention_rules(keys, blk, hf)
        ffn = moe_rules(metadata, blk, hf) if experts else dense_rules(keys, blk, hf)
        out += [*norm_rules(blk, hf, keys.n_embd), *mixer, *ffn]
    return out + further_rules(metadata, experts=experts)


def _delta_rules(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    n_embd, d, attn = keys.n_embd, DeltaSizes.of(keys), hf + "linear_attn."

    def tiled(size: int = 1, first: int = 0, axis: int = 0) -> Layout:
        if d.n_key_head == d.n_value_head:
            return PLAIN
        return Tiled(d.n_key_head, d.n_value_head, size, first, axis)

    by_head, conv = tiled(), Chained((d.conv_shape, tiled(d.value_size, 2 * d.n_keys)))
    return [
        rule(
            blk + "attn_qkv.weight",
            (d.n_conv, n_embd),
            attn + "in_proj_qkv.weight",
            layout=tiled(d.value_size, 2 * d.n_keys),
        ),
        rule(blk + "attn_gate.weight", (d.n_values, n_embd), attn + "in_proj_z.weight", layout=tiled(d.value_size)),
        rule(blk + "ssm_beta.weight", (d.n_value_head, n_embd), attn + "in_proj_b.weight", layout=by_head),
        rule(blk + "ssm_alpha.weight", (d.n_value_head, n_embd), attn + "in_proj_a.weight", layout=by_head),
        rule(blk + "ssm_conv1d.weight", (d.n_conv, d.kernel), attn + "conv1d.weight", layout=conv, draw=CONV_DRAW),
        rule(blk + "ssm_dt.bias", (d.n_value_head,), attn + "dt_bias", layout=by_head, draw=DT_DRAW),
        rule(
            blk + "ssm_a",
            (d.n_value_head,),
            attn + "A_log",
            layout=Chained((MINUS_EXP, by_head)),
            draw=decays(0.05, 1.0),
        ),
        rule(blk + "ssm_norm.weight", (d.value_size,), attn + "norm.weight"),
        rule(
            blk + "ssm_out.weight",
            (n_embd, d.n_values),
            attn + "out_proj.weight",
            layout=tiled(d.value_size, axis=1),
        ),
    ]


def example(
    model_type: str, architecture: str, more: Callable[[Sizes], dict[str, Any]], sizes: Sizes
) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
    own = {"rope_theta": None, "partial_rotary_factor": None, "rope_parameters": rope}
    return next_example(sizes, model_type, architecture, **own, **more(sizes))


def _map(arch: str, *, experts: bool, model_type: str, name: str, more: Callable[[Sizes], dict[str, Any]]) -> ArchMap:
    return ArchMap(
        arch=arch,
        model_types=(model_type, model_type + "_text"),
        architectures=(f"{name}ForCausalLM", f"{name}ForConditionalGeneration"),
        metadata=partial(metadata, arch),
        rules=partial(rules, experts),
        example=partial(example, model_type + "_text", f"{name}ForCausalLM", more),
        ignored=("mtp.", "model.mtp.", "model.visual."),
    )


MAPS = (
    _map("qwen35", experts=False, model_type="qwen3_5", name="Qwen3_5", more=lambda sizes: {}),
    _map(
        "qwen35moe",
        experts=True,
        model_type="qwen3_5_moe",
        name="Qwen3_5Moe",
        more=lambda sizes: experts_example(sizes) | {"intermediate_size": None},
    ),
)
