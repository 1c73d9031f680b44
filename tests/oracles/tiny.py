"""Tiny random Hugging Face models in which every feature of an architecture bites.

`CASES` names them; `build_checkpoint` writes one as a folder. A feature bites when a forward that ignored it would be
far off: fewer KV heads than heads, a head size that is not width / heads, norms away from one, biases of the size of
what they are added to, experts that differ, windows and original contexts shorter than the input. `wide` gives the
same model with widths that are multiples of 256, so that every quantization type applies.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

N_TOKENS = 80  # longer than every window and original context below
ORIGINAL_CONTEXT = 32

Builder = Callable[[bool], PreTrainedConfig]  # called with `wide`


def sizes(wide: bool, **more: Any) -> dict[str, Any]:
    """Widths that the cases share; 8 heads on 2 KV heads, and heads wider than width / heads."""
    base: dict[str, Any] = {
        "vocab_size": 320 if wide else 160,
        "hidden_size": 256 if wide else 64,
        "intermediate_size": 512 if wide else 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64 if wide else 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-3,  # large enough to be seen
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return base | more


def rope(theta: float, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT}


def _llama(wide: bool) -> PreTrainedConfig:
    return LlamaConfig(**sizes(wide), **rope(5e3), tie_word_embeddings=False)


def _llama_square(wide: bool) -> PreTrainedConfig:
    """As Llama 2 and SmolLM2 are: no head size in the config, head tied."""
    return LlamaConfig(**sizes(wide, num_attention_heads=4, head_dim=None), **rope(1e4), tie_word_embeddings=True)


def _llama3(wide: bool) -> PreTrainedConfig:
    return LlamaConfig(**sizes(wide), **rope(1e4, "llama3", **LLAMA3), tie_word_embeddings=True)


def _llama_linear(wide: bool) -> PreTrainedConfig:
    return LlamaConfig(**sizes(wide), **rope(1e4, "linear", factor=3.0), tie_word_embeddings=False)


def _llama_yarn(wide: bool) -> PreTrainedConfig:
    return LlamaConfig(**sizes(wide), **rope(1e4, "yarn", **YARN), tie_word_embeddings=False)


def _llama_biases(wide: bool) -> PreTrainedConfig:
    return LlamaConfig(**sizes(wide), **rope(1e4), attention_bias=True, mlp_bias=True, tie_word_embeddings=False)


def _mistral(wide: bool) -> PreTrainedConfig:
    return MistralConfig(**sizes(wide), **rope(1e6), sliding_window=None, tie_word_embeddings=False)


def _mistral_window(wide: bool) -> PreTrainedConfig:
    return MistralConfig(**sizes(wide), **rope(1e4), sliding_window=24, tie_word_embeddings=False)


def _mixtral(wide: bool) -> PreTrainedConfig:
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2}
    return MixtralConfig(**sizes(wide), **rope(1e6), **experts, sliding_window=None, tie_word_embeddings=False)


def _qwen2(wide: bool) -> PreTrainedConfig:
    more = sizes(wide, num_attention_heads=4)
    del more["head_dim"]  # Qwen 2 has none of its own
    return Qwen2Config(**more, **rope(1e6), tie_word_embeddings=True)


def _qwen2_yarn(wide: bool) -> PreTrainedConfig:
    more = sizes(wide, num_attention_heads=4)
    del more["head_dim"]
    return Qwen2Config(**more, **rope(1e4, "yarn", **YARN), tie_word_embeddings=False)


def _qwen2_window(wide: bool) -> PreTrainedConfig:
    more = sizes(wide, num_attention_heads=4)
    del more["head_dim"]
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    return Qwen2Config(**more, **rope(1e6), **window, tie_word_embeddings=True)


def _qwen3(wide: bool) -> PreTrainedConfig:
    return Qwen3Config(**sizes(wide), **rope(1e6), tie_word_embeddings=True)


def _qwen3_yarn(wide: bool) -> PreTrainedConfig:
    return Qwen3Config(**sizes(wide), **rope(1e4, "yarn", **YARN), tie_word_embeddings=False)


def _qwen3_yarn_stated(wide: bool) -> PreTrainedConfig:
    stated = YARN | {"attention_factor": 1.4, "beta_fast": 2.0, "beta_slow": 0.3}
    return Qwen3Config(**sizes(wide), **rope(1e4, "yarn", **stated), tie_word_embeddings=False)


def _qwen3_biases(wide: bool) -> PreTrainedConfig:
    return Qwen3Config(**sizes(wide), **rope(1e6), attention_bias=True, tie_word_embeddings=False)


def _qwen3moe(wide: bool, *, normalised: bool = True) -> PreTrainedConfig:
    experts = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 256 if wide else 64}
    return Qwen3MoeConfig(**sizes(wide), **rope(1e6), **experts, norm_topk_prob=normalised, tie_word_embeddings=False)


def _qwen3moe_unnormalised(wide: bool) -> PreTrainedConfig:
    return _qwen3moe(wide, normalised=False)


CASES: dict[str, Builder] = {
    "llama": _llama,
    "llama-square": _llama_square,
    "llama-llama3": _llama3,
    "llama-linear": _llama_linear,
    "llama-yarn": _llama_yarn,
    "llama-biases": _llama_biases,
    "mistral": _mistral,
    "mistral-window": _mistral_window,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2-yarn": _qwen2_yarn,
    "qwen2-window": _qwen2_window,
    "qwen3": _qwen3,
    "qwen3-yarn": _qwen3_yarn,
    "qwen3-yarn-stated": _qwen3_yarn_stated,
    "qwen3-biases": _qwen3_biases,
    "qwen3moe": _qwen3moe,
    "qwen3moe-unnormalised": _qwen3moe_unnormalised,
}

ENGINE_DIFFERS: dict[str, str] = {
    "mistral-window": "llama.cpp's llama graph has no sliding window",
    "qwen2-window": "llama.cpp's qwen2 graph has no sliding window",
    "qwen3-yarn-stated": "llama.cpp reads no yarn_attn_factor, yarn_beta_fast, yarn_beta_slow for this architecture",
    "qwen3-biases": "llama.cpp knows no bias on qwen3's output projection and refuses the file",
    "qwen3moe-unnormalised": "llama.cpp's qwen3moe graph always normalises the experts' weights",
}
"""Cases whose model llama.cpp does not compute, and what it lacks; the other cases must agree."""


def build_model(case: str, *, wide: bool = False, seed: int = 0) -> Any:
    """The transformers model of a case with random weights, float32, in evaluation mode."""
    config = CASES[case](wide)
    config._attn_implementation = config._experts_implementation = "eager"  # the definition, not a kernel
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    return model.eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep activations near one and logits apart; norms around one, biases and scalars that matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "embed" in name:
                parameter.copy_(normal(parameter.shape) * 0.7)
            elif parameter.ndim >= 2:
                parameter.copy_(normal(parameter.shape) * 1.3 / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(normal(parameter.shape) * 0.5)
            else:  # a norm: around what it starts from, which is 1, or 0 where 1 is added
                parameter.copy_(parameter + (normal(parameter.shape) * 0.3).clamp(-0.7, 0.7))


def build_checkpoint(case: str, folder: Path, wide: bool = False) -> Path:
    """Write a case's checkpoint into `folder`; the same case always has the same weights."""
    build_model(case, wide=wide).save_pretrained(folder)
    return folder


def old_config(folder: Path) -> None:
    """Rewrite a folder's config.json to the form before transformers 5: `rope_theta` and `rope_scaling`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = scaling if scaling["type"] != "default" else None
    path.write_text(json.dumps(config))


def tokens(case: str, n: int = N_TOKENS, seed: int = 1) -> torch.Tensor:
    """Random token ids [n] within the narrow vocabulary; good for both widths."""
    vocab = CASES[case](False).get_text_config().vocab_size
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed))
