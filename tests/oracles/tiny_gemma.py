"""Tiny random Gemma 2, 3 and 4 models in which every feature bites; the shape is `tiny.py`'s.

Beside what `tiny.py` counts: windows shorter than the input, caps of the size of what they cap, scores that are
scaled otherwise than by the head size, layer scalars, rope that differs between global and sliding layers, global
heads of another size and number, keys that are values, values borrowed from earlier layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from tests.oracles.tiny import N_TOKENS, Builder, rope, sizes

WINDOW = 16
SLIDING, GLOBAL = "sliding_attention", "full_attention"
TWO_PERIODS = [SLIDING, SLIDING, GLOBAL] * 2


def _gemma2(wide: bool, **more: Any) -> Gemma2Config:
    base = sizes(wide, num_hidden_layers=4, sliding_window=WINDOW)
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}
    scale = {"query_pre_attn_scalar": base["head_dim"]}
    return Gemma2Config(**(base | caps | scale | rope(1e4) | more))


def _gemma2_scale(wide: bool) -> PreTrainedConfig:
    return _gemma2(wide, query_pre_attn_scalar=9, layer_types=[GLOBAL, SLIDING, SLIDING, GLOBAL])


def _gemma3(wide: bool, **more: Any) -> Gemma3TextConfig:
    base = sizes(wide, num_hidden_layers=7, sliding_window=WINDOW)
    ropes = {
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            GLOBAL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        }
    }
    return Gemma3TextConfig(**(base | ropes | {"query_pre_attn_scalar": base["head_dim"]} | more))


def _gemma3_pattern(wide: bool) -> PreTrainedConfig:
    """As Gemma 3 need not be, but its configs can say: another order of layers, capped logits."""
    return _gemma3(wide, num_hidden_layers=6, layer_types=TWO_PERIODS, final_logit_softcapping=4.0)


def _gemma3_scale(wide: bool) -> PreTrainedConfig:
    return _gemma3(wide, query_pre_attn_scalar=9)


def _gemma3_image(wide: bool) -> PreTrainedConfig:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return Gemma3Config(text_config=_gemma3(wide).to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4)


def _gemma4_text(wide: bool, **more: Any) -> dict[str, Any]:
    base = sizes(wide, num_hidden_layers=6, sliding_window=WINDOW, layer_types=TWO_PERIODS)
    return (
        base
        | {
            "global_head_dim": 2 * base["head_dim"],
            "final_logit_softcapping": 4.0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": base["vocab_size"],
        }
        | more
    )


K_EQ_V = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}  # sliding layers have 2


def _gemma4(wide: bool) -> PreTrainedConfig:
    return Gemma4TextConfig(**_gemma4_text(wide, **K_EQ_V))


def _gemma4_rotary_share(wide: bool) -> PreTrainedConfig:
    """Three quarters of the pairs of a global head turn, and globals have values of their own."""
    ropes = {
        SLIDING: {"rope_type": "default", "rope_theta": 2e4},
        GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.75, "rope_theta": 5e5},
    }
    return Gemma4TextConfig(**_gemma4_text(wide, rope_parameters=ropes, final_logit_softcapping=None))


def _gemma4_experts(wide: bool) -> PreTrainedConfig:
    experts = {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 256 if wide else 48}
    layers = {"num_hidden_layers": 3, "layer_types": TWO_PERIODS[:3]}
    return Gemma4TextConfig(**_gemma4_text(wide, **K_EQ_V, enable_moe_block=True, **experts, **layers))


def _gemma4_e(wide: bool) -> PreTrainedConfig:
    """As E2B and E4B: per-layer embeddings; the second period borrows keys and values and has a wider MLP."""
    shared = {"num_kv_shared_layers": 3, "use_double_wide_mlp": True}
    return Gemma4TextConfig(**_gemma4_text(wide, **shared, hidden_size_per_layer_input=256 if wide else 32))


def _gemma4_image(wide: bool) -> PreTrainedConfig:
    return Gemma4Config(text_config=_gemma4(wide).to_dict(), vision_config=None, audio_config=None)


def _gemma4_unified(wide: bool) -> PreTrainedConfig:
    text = _gemma4_text(wide, **K_EQ_V)
    for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
        del text[key]
    text["moe_intermediate_size"] = None  # the class has no such key; llama.cpp's converter insists on it
    return Gemma4UnifiedConfig(
        text_config=Gemma4UnifiedTextConfig(**text).to_dict(), vision_config=None, audio_config=None
    )


CASES: dict[str, Builder] = {
    "gemma2": _gemma2,
    "gemma2-scale": _gemma2_scale,
    "gemma3": _gemma3,
    "gemma3-pattern": _gemma3_pattern,
    "gemma3-scale": _gemma3_scale,
    "gemma3-image": _gemma3_image,
    "gemma4": _gemma4,
    "gemma4-rotary-share": _gemma4_rotary_share,
    "gemma4-experts": _gemma4_experts,
    "gemma4-e": _gemma4_e,
    "gemma4-image": _gemma4_image,
    "gemma4-unified": _gemma4_unified,
}

ENGINE_DIFFERS: dict[str, str] = {
    "gemma2-scale": "llama.cpp reads no attention.scale for this architecture",
    "gemma3-scale": "llama.cpp reads no attention.scale for this architecture",
}
"""Cases whose model llama.cpp does not compute, and what it lacks; the other cases must agree."""

SEEDS = {"gemma4-experts": 1}
"""Where not 0: weights with which no token's choice of experts is so close (7e-4 in logits, over both widths) that
what ggml's GELU convention does to the logits could turn it."""

_WITH_IMAGES = {
    Gemma3Config: Gemma3ForConditionalGeneration,
    Gemma4Config: Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig: Gemma4UnifiedForConditionalGeneration,
}


def build_model(case: str, *, wide: bool = False, seed: int | None = None) -> Any:
    """The transformers model of a case with random weights, float32, in evaluation mode."""
    config = CASES[case](wide)
    config._attn_implementation = config._experts_implementation = "eager"  # the definition, not a kernel
    if type(config) in _WITH_IMAGES:
        text = config.get_text_config()
        text._attn_implementation = text._experts_implementation = "eager"
        model = _WITH_IMAGES[type(config)](config)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(
        model, SEEDS.get(case, 0) if seed is None else seed, unscaled_scores=config.model_type.startswith("gemma4")
    )
    return model.eval()


def randomise(model: torch.nn.Module, seed: int, *, unscaled_scores: bool) -> None:
    """Weights that keep activations near one and logits apart; norms, scalars and routers that matter.

    Embeddings are small, for the model multiplies them by √width. With `unscaled_scores` (Gemma 4) the norms of
    queries and keys are, too: their product is the only scale that attention scores have.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    scalars = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
    with torch.no_grad():
        for name, parameter in sorted([*model.named_parameters(), *scalars]):
            if "embed_tokens" in name:
                parameter.copy_(normal(parameter.shape) / parameter.shape[-1] ** 0.5)
            elif parameter.ndim >= 2:
                parameter.copy_(normal(parameter.shape) * 1.3 / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(normal(parameter.shape) * 0.5)
            else:  # a norm or scale: around what it starts from, which is 1, or 0 where 1 is added
                parameter.copy_(parameter + (normal(parameter.shape) * 0.3).clamp(-0.7, 0.7))
                if unscaled_scores and name.endswith(("q_norm.weight", "k_norm.weight")):
                    parameter.mul_(parameter.shape[-1] ** -0.25)


def build_checkpoint(case: str, folder: Path, wide: bool = False) -> Path:
    """Write a case's checkpoint into `folder`; the same case always has the same weights."""
    build_model(case, wide=wide).save_pretrained(folder)
    return folder


def tokens(case: str, n: int = N_TOKENS, seed: int = 1) -> torch.Tensor:
    """Random token ids [n] within the narrow vocabulary; good for both widths."""
    vocab = CASES[case](False).get_text_config().vocab_size
    return torch.randint(3, vocab, (n,), generator=torch.Generator().manual_seed(seed))
