"""`qwen2vl`, `qwen3vl` and `qwen3vlmoe`: the text models of Qwen 2, 2.5 and 3 VL.

Tensors of Qwen 2, 3 and 3 MoE under other prefixes. config.json is flat in Qwen 2 VL's first form and has a
`text_config` since. Qwen 3 VL's experts are published as `gate_up_proj` [n_expert, width, 2 n_ff] and `down_proj`
[n_expert, n_ff, width], the other way round than everywhere else; transformers 5 saves them with both axes exchanged,
which the shape tells unless the sides are equal. Their weights always sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.names import qwen2, qwen3
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._draw import by_width
from diffharness.weights.names._keys import Keys, decoder_example, decoder_metadata, embedding_rules
from diffharness.weights.names._map import ArchMap, Config, Piece, Sizes, TensorRule
from diffharness.weights.names._nested import moved
from diffharness.weights.names._shared_experts import expert_width
from diffharness.weights.names._sliding import sliding_metadata
from diffharness.weights.names.qwen3 import HEAD_DIM, attention_rules
from diffharness.weights.source import Float32Array, Metadata


@dataclass(frozen=True)
class EitherWay(Piece):
    """A `Piece` of a stack whose matrices may be stored the other way round."""

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        [stack] = parts
        return super().to_gguf([stack if stack.shape == self.hf else np.ascontiguousarray(_turned(stack))])


_SECTIONS = {"qwen2vl": [16, 24, 24], "qwen3vl": [24, 20, 20], "qwen3vlmoe": [24, 20, 20]}  # the classes' own
_THETA = {"qwen2vl": 1e6, "qwen3vl": 5e5, "qwen3vlmoe": 5e5}
IGNORED = ("visual.", "model.visual.", "thinker.", "talker.", "token2wav.")


def _metadata(config: Config, arch: str, head_dim: int | None) -> dict[str, Any]:
    inner = config.get("text_config")
    text = dict(inner) if isinstance(inner, dict) else dict(config)
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    expect_activation(text, "silu")
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if (rope.get("rope_type") or rope.get("type")) == "mrope":  # what sections alone were once called
        rope |= {"type": "default", "rope_type": "default"}
    text |= {"tie_word_embeddings": tied, "rope_scaling": rope, "rope_parameters": None}
    sections = list(rope.get("mrope_section") or _SECTIONS[arch])
    out = decoder_metadata(text, arch, default_theta=_THETA[arch], head_dim=head_dim) | sliding_metadata(text, arch)
    return out | {f"{arch}.rope.dimension_sections": (sections + [0] * 4)[:4]}


def _deepstack(config: Config, arch: str) -> dict[str, int]:
    vision = config.get("vision_config") or {}
    return {f"{arch}.n_deepstack_layers": len(vision.get("deepstack_visual_indexes") or ())}


def qwen2_metadata(config: Config) -> dict[str, Any]:
    return _metadata(config, "qwen2vl", None)


def qwen3_metadata(config: Config) -> dict[str, Any]:
    return _metadata(config, "qwen3vl", HEAD_DIM) | _deepstack(config, "qwen3vl")


def moe_metadata(config: Config) -> dict[str, Any]:
    arch, text = "qwen3vlmoe", config.get("text_config") or config
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        raise CheckpointError("config.json: expected experts in every layer, found layers without (mlp_only_layers)")
    return _metadata(config, arch, None) | {
        f"{arch}.expert_count": need_int(text, "num_experts", "num_local_experts"),
        f"{arch}.expert_used_count": need_int(text, "num_experts_per_tok"),
        f"{arch}.expert_feed_forward_length": need_int(text, "moe_intermediate_size"),
        **_deepstack(config, arch),
    }


def qwen2_rules(metadata: Metadata) -> list[TensorRule]:
    return moved(qwen2.rules(metadata), "model.", "model.language_model.", "language_model.model.")


def qwen3_rules(metadata: Metadata) -> list[TensorRule]:
    return moved(qwen3.rules(metadata), "model.language_model.", "language_model.model.", "model.")


def moe_rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_expert, n_embd = keys.n_expert, keys.n_embd
    n_ff = expert_width(keys, 0)
    both, down = (n_expert, n_embd, 2 * n_ff), (n_expert, n_ff, n_embd)
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}.mlp."
        pair, one = (hf + "experts.gate_up_proj",), (n_expert, n_ff, n_embd)
        out += [
            *attention_rules(metadata, il),
            TensorRule(blk + "ffn_gate_inp.weight", (n_expert, n_embd), (hf + "gate.weight",)),
            TensorRule(blk + "ffn_gate_exps.weight", one, pair, EitherWay(both, lambda w: _turned(w[..., :n_ff]))),
            TensorRule(blk + "ffn_up_exps.weight", one, pair, EitherWay(both, lambda w: _turned(w[..., n_ff:]))),
            TensorRule(
                blk + "ffn_down_exps.weight",
                (n_expert, n_embd, n_ff),
                (hf + "experts.down_proj",),
                EitherWay(down, _turned),
                draw=by_width(),
            ),
        ]
    return moved(out, "model.language_model.", "language_model.model.", "model.")


def _turned(stack: Any) -> Any:
    """Every matrix of a stack with rows and columns exchanged, as a view."""
    return np.swapaxes(stack, -1, -2)


# -- synthetic models -----------------------------------------------------------------------------------


def _sections(n_pairs: int) -> list[int]:
    """Sections in which every pair of a head finds its place, whichever way they are laid out."""
    height, width = (n_pairs + 1) // 3, n_pairs // 3
    return [n_pairs - height - width, height, width]


def qwen2_example(sizes: Sizes) -> dict[str, Any]:
    """Flat, as published. The epsilon is a usual one: the engine does not read it."""
    size = sizes.n_embd // sizes.n_head
    rope = {"type": "mrope", "mrope_section": _sections(size // 2)}
    more: dict[str, Any] = {"rope_scaling": rope, "rms_norm_eps": 1e-6, "vision_config": _vision(sizes, embed_dim=32)}
    return decoder_example(sizes, "qwen2_vl", "Qwen2VLForConditionalGeneration", head_dim=None, **more)


def qwen3_example(sizes: Sizes) -> dict[str, Any]:
    return _nested(sizes, "qwen3_vl", "Qwen3VLForConditionalGeneration")


def moe_example(sizes: Sizes) -> dict[str, Any]:
    experts = {
        "num_experts": sizes.n_expert,
        "num_experts_per_tok": sizes.n_expert_used,
        "moe_intermediate_size": 2 * sizes.n_ff_expert,  # transformers tells the stacks' layout by unequal sides
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return _nested(sizes, "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", **experts)


def _nested(sizes: Sizes, model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    sections = _sections(sizes.head_dim // 2)
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": sections, "mrope_interleaved": True}
    text = decoder_example(sizes, model_type + "_text", architecture, rope_scaling=rope, **more)
    del text["architectures"]
    vision = {"deepstack_visual_indexes": [0, 1], "out_hidden_size": sizes.n_embd, "num_position_embeddings": 16}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": text,
        "vision_config": _vision(sizes, intermediate_size=32, **vision),
        "tie_word_embeddings": False,
    }


def _vision(sizes: Sizes, **more: Any) -> dict[str, Any]:
    """The smallest image model that config.json may describe; none of its tensors are made."""
    return {"depth": 2, "hidden_size": sizes.n_embd, "num_heads": 2, "patch_size": 4, **more}


MAPS = (
    ArchMap(
        arch="qwen2vl",
        model_types=("qwen2_vl", "qwen2_5_vl", "qwen2_vl_text", "qwen2_5_vl_text"),
        architectures=("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        metadata=qwen2_metadata,
        rules=qwen2_rules,
        example=qwen2_example,
        transformers=False,
        otherwise="its image-and-text classes",  # no causal model of it by itself
        ignored=IGNORED,
    ),
    ArchMap(
        arch="qwen3vl",
        model_types=("qwen3_vl", "qwen3_vl_text"),
        architectures=("Qwen3VLForConditionalGeneration",),
        metadata=qwen3_metadata,
        rules=qwen3_rules,
        example=qwen3_example,
        transformers=False,
        otherwise="its image-and-text classes",
        ignored=IGNORED,
    ),
    ArchMap(
        arch="qwen3vlmoe",
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        architectures=("Qwen3VLMoeForConditionalGeneration",),
        metadata=moe_metadata,
        rules=moe_rules,
        example=moe_example,
        transformers=False,
        otherwise="its image-and-text classes",
        ignored=IGNORED,
    ),
)
