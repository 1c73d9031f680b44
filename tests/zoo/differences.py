"""What llama.cpp computes otherwise than the generator's models are defined, each with its proof.

The proof is the reference built as the engine computes: with all of a model's differences every tap must agree, and
without any one of them some tap must not (`test_graph`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffharness.reference import moe, ops
from diffharness.reference.archs import Build
from diffharness.reference.archs.baichuan import Baichuan
from diffharness.reference.archs.phimoe import PhiMoe
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.hypotheses import Seen, altered
from diffharness.reference.model import Weights
from diffharness.reference.steps import Steps
from diffharness.taps import split


@dataclass(frozen=True)
class Difference:
    """What the engine does, in words and as what it makes of an architecture's builder."""

    says: str
    engines: Callable[[Build], Build]


# -- ways to differ ------------------------------------------------------------------------------------


def model_as(change: Callable[[Steps], Steps]) -> Callable[[Build], Build]:
    """A builder of changed models."""

    def engines(build: Build) -> Build:
        return lambda metadata: change(build(metadata))

    return engines


def of_class(kind: Any) -> Callable[[Build], Build]:
    """A builder of another class's models; whatever differs besides must come after it."""
    return lambda build: kind.from_metadata


def having(model: Steps, **values: Any) -> Steps:
    """The model with other hyperparameters."""
    made = copy.copy(model)
    vars(made).update(values)
    return made


def on_weights(view: Callable[[Weights], Weights]) -> Callable[[Steps], Steps]:
    """The model on weights as `view` shows them."""
    return lambda model: altered(
        model,
        embed=lambda me, plain, w, *rest: plain(view(w), *rest),
        layer=lambda me, plain, w, *rest: plain(view(w), *rest),
        head=lambda me, plain, w, *rest: plain(view(w), *rest),
    )


def not_using(*tensors: str) -> Callable[[Build], Build]:
    """Tensors of these names, with or without `blk.N.`, are loaded and left alone."""

    def rename(name: str) -> str | None:
        return None if name in tensors or split(name)[1] in tensors else name

    return model_as(on_weights(lambda w: Seen(w, rename)))


def scaling_after_bias(*matrices: str) -> Callable[[Build], Build]:
    """W x + b is multiplied by the matrix's scale, in place of W x alone."""

    def view(w: Weights) -> Weights:
        def change(name: str, value: Tensor) -> Tensor:
            matrix, _, part = name.rpartition(".")
            scale = w.find(matrix + ".scale") if part == "bias" and split(matrix)[1] in matrices else None
            return value if scale is None else value * scale

        return Seen(w, change=change)

    return model_as(on_weights(view))


def one_eps(*names: str) -> Callable[[Build], Build]:
    """Norms with an epsilon of their own take that of all others."""
    return model_as(lambda model: having(model, **dict.fromkeys(names, model.eps)))


class MixtralRouting(PhiMoe):
    """Phi-3.5-MoE with the routing of Mixtral."""

    def route(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return moe.route(logits, self.n_expert_used, normalise=True)


class WithoutPositions(Baichuan):
    """Baichuan of any number of layers, which neither turns nor has ALiBi."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super(Baichuan, cls).read(hp) | {"max_alibi_bias": 0.0}

    def rotary(self, il: int) -> ops.Rotary:
        return replace(super().rotary(il), n_rot=0)


def _rms_norms(model: Steps) -> Steps:
    def norm(me: Steps, plain: Any, w: Weights, name: str, x: Tensor) -> Tensor:
        return ops.rms_norm(x, w.get(name), me.eps) + w.get(name.removesuffix("weight") + "bias")

    return altered(model, norm=norm)


# -- what differs in many models -----------------------------------------------------------------------


def _scales(of: str, *matrices: str) -> Difference:
    return Difference(f"ignores scales of {of}", not_using(*(f"{name}.scale" for name in matrices)))


FFN = _scales("the feed-forward", "ffn_gate", "ffn_up", "ffn_down")
EXPERTS = _scales("experts", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHARED = _scales("shared experts", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
AFTER_BIAS = Difference(
    "multiplies by the feed-forward's scales after the bias", scaling_after_bias("ffn_gate", "ffn_up", "ffn_down")
)
DELTA_EPS = Difference("normalises queries and keys of delta rules by the other norms' epsilon", one_eps("l2_eps"))
LATENT_EPS = Difference("normalises latents by the other norms' epsilon", one_eps("latent_eps"))
NO_OUTPUT_BIAS = Difference("does not add attn_output.bias", not_using("attn_output.bias"))

# -- the models ----------------------------------------------------------------------------------------

_SCALES: dict[tuple[Difference, ...], str] = {
    (FFN,): "arcee-dense bloom-dense chatglm-dense command-r-dense deci-dense exaone-dense falcon-dense gemma-dense "
    "gemma2-dense gemma3-dense glm4-dense gpt2-dense gptneox-dense granite-dense granite_swa-dense "
    "granitehybrid-dense granitemoe-dense hunyuan-dense-dense internlm2-dense jamba-dense lfm2-dense minicpm-dense "
    "mpt-dense nemotron-dense olmo-dense olmo2-dense orion-dense phi2-dense phi3-dense qwen-dense qwen2-dense "
    "qwen3vl-dense seed_oss-dense smollm3-dense stablelm-dense starcoder2-dense xverse-dense",
    (EXPERTS,): "dbrx-moe gpt-oss-moe minicpm-moe minimax-m2-moe olmoe-moe qwen3vlmoe-moe",
    (EXPERTS, SHARED): "bailingmoe-moe granite-moe granitemoe-moe hunyuan-moe-moe qwen2moe-moe",
    (FFN, EXPERTS, SHARED): "bailingmoe2-moe deepseek-moe dots1-moe exaone-moe-moe glm4moe-moe llama4-moe",
    (AFTER_BIAS,): "llama-dense mistral3-dense nemotron_h-dense nemotron_h_moe-dense",
}

DIFFERENCES: dict[str, tuple[Difference, ...]] = {
    **{model: differences for differences, models in _SCALES.items() for model in models.split()},
    "baichuan-dense": (
        Difference("gives models of other than 32 and 40 layers no positions", of_class(WithoutPositions)),
        FFN,
    ),
    "deepseek2-moe": (FFN, EXPERTS, SHARED, LATENT_EPS),
    "ernie4_5-moe": (FFN, NO_OUTPUT_BIAS),
    "ernie4_5-moe-moe": (FFN, EXPERTS, SHARED, NO_OUTPUT_BIAS),
    "exaone4-dense": (
        FFN,
        Difference(
            "has windows, and layers that do not turn, in models of 64 layers only",
            model_as(lambda model: having(model, window=(None,) * model.n_layer, hybrid=False)),
        ),
    ),
    "falcon-h1-dense": (FFN, NO_OUTPUT_BIAS, Difference("does not use rope_freqs", not_using("rope_freqs.weight"))),
    "grok-moe": (
        FFN,
        EXPERTS,
        Difference("does not cap the router's logits", model_as(lambda model: having(model, router_softcap=None))),
    ),
    "kimi-linear-moe": (
        FFN,
        EXPERTS,
        SHARED,
        Difference(
            "ignores scales of delta rules, and of queries",
            not_using(*(f"attn_{x}.scale" for x in "qkv"), "ssm_beta.scale", "blk.1.attn_output.scale"),
        ),
        Difference("does not add biases of a delta rule's projections", not_using(*(f"attn_{x}.bias" for x in "qkv"))),
        Difference("normalises latents, and q and k of delta rules, by the other norms' epsilon", one_eps("fixed_eps")),
    ),
    "lfm2moe-moe": (
        FFN,
        EXPERTS,
        Difference(
            "makes experts' weights sum to one in any case",
            model_as(lambda model: having(model, normalise_experts=True, sum_offset=0.0)),
        ),
    ),
    "minicpm3-dense": (FFN, LATENT_EPS),
    "phimoe-moe": (
        Difference("routes as Mixtral", of_class(MixtralRouting)),
        EXPERTS,
        Difference("has RMSNorms in place of LayerNorms", model_as(_rms_norms)),
    ),
    "qwen2vl-dense": (
        FFN,
        Difference("does not add output.bias", not_using("output.bias")),
    ),
    "qwen35-dense": (DELTA_EPS,),
    "qwen35moe-moe": (DELTA_EPS,),
    "qwen3next-moe": (
        Difference("ignores scales of delta rules", not_using("attn_qkv.scale", "attn_gate.scale", "ssm_out.scale")),
        DELTA_EPS,
    ),
}
