"""What few architectures have: clamps, temperatures, lists of factors, gates that open seldom, recurrent mixers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffharness.reference.hypotheses._altering import Alteration, altered, seeing
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.steps import Steps

QKV = frozenset({"attn_qkv", "attn_q", "attn_k", "attn_v", "attn_q_rope", "attn_k_rope", "attn_ctx"})
TURNED = frozenset({"attn_q_rope", "attn_k_rope", "attn_ctx"})
CONTEXT = frozenset({"attn_q_rope", "attn_ctx"})
MIXED = frozenset({"ssm_dt", "ssm_scan", "ssm_norm", "ssm_out"})
CONVOLVED = frozenset({"ssm_conv", "attn_q_conv", "attn_k_conv", "attn_v_conv"})
ACTED = frozenset({"ffn_act", "ffn_out"})

# Field of a model, another value, what that means, and where it may show first. A field that a model does not have, or
# that is null or zero in it, is passed over; so is a truth value for another kind of field.
STATED: tuple[tuple[str, Any, str, frozenset[str]], ...] = (
    ("clamp", 1e30, "queries, keys and values were not clamped", QKV),
    ("span", "long", "LongRoPE's list for long texts were in use", TURNED),
    ("n_ctx_orig", 1 << 40, "LongRoPE's list for short texts were in use", TURNED),
    ("temperature", 0.0, "the temperature of queries were absent", CONTEXT),
    ("query_growth", 0.0, "queries did not grow with their position", CONTEXT),
    ("norm_first", True, "the mixer's output were normalised before its gate", MIXED),
    ("norm_first", False, "the mixer's output were gated before its norm", MIXED),
    ("parts_eps", None, "what time steps, b and c are made of were not normalised", MIXED),
)


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on what single architectures state."""
    if not scene.in_layer:
        return
    model: Any = scene.model
    for field, value, says, taps in STATED:
        own = getattr(model, field, value)
        if own != value and (own or own is False) and isinstance(value, bool) == isinstance(own, bool):
            yield Hypothesis(f"stated.{field}", says, taps, _with(**{field: value}))
    if getattr(model, "parts_eps", 0.0) is None:
        says = "what time steps, b and c are made of were normalised"
        yield Hypothesis("stated.parts_eps", says, MIXED, _with(parts_eps=model.eps))
    sparsity = getattr(model, "sparsity", None)
    if sparsity is not None and any(sparsity):
        says = "all gates of sparse layers were let through"
        yield Hypothesis("stated.sparsity", says, ACTED, _with(sparsity=(None,) * len(sparsity)))
        says = "the standard deviation of the gates were divided by their number less one"
        yield Hypothesis("stated.spread", says, ACTED, lambda model: altered(model, spread=_sample_deviation))
    yield from _mixers(scene)


def _mixers(scene: Scene) -> Iterator[Hypothesis]:
    """Parts of a recurrent layer left out or read wrongly."""
    convolutions = [
        stem for stem in ("ssm_conv1d", "shortconv.conv", *_QKV_CONVOLUTIONS) if scene.has(f"{stem}.weight")
    ]
    if convolutions:
        says = "the short convolution had its weights in reverse order"
        yield Hypothesis("mixer.conv-reversed", says, CONVOLVED, _changed("conv", lambda v: v.flip(-1)))
        says = "the short convolution saw the token itself only"
        yield Hypothesis("mixer.conv-forgets", says, CONVOLVED, _changed("conv", _last_only))
    for stem, words in (("ssm_d", "what a mixer passes by its state"), ("ssm_dt.bias", "the bias of time steps")):
        if scene.has(stem):
            says = f"{words} ({stem}) were left out"
            yield Hypothesis("mixer.absent", says, MIXED, _changed(stem, torch.zeros_like))
    if scene.has("ssm_a"):
        says = "ssm_a were the logarithm that a checkpoint has, and not minus its exponential"
        yield Hypothesis("mixer.a-log", says, MIXED | {"ssm_decay"}, _changed("ssm_a", lambda a: (-a).log()))
    if scene.has("ssm_norm.weight"):
        says = "the norm of a mixer's output had no weight"
        yield Hypothesis("mixer.norm-weight", says, MIXED, _changed("ssm_norm.weight", torch.ones_like))


_QKV_CONVOLUTIONS = ("ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v")


def _sample_deviation(me: Steps, plain: Callable[..., Tensor], gate: Tensor) -> Tensor:
    return gate.std(dim=-1, keepdim=True, unbiased=True)


def _last_only(weight: Tensor) -> Tensor:
    kept = torch.zeros_like(weight)
    kept[..., -1] = weight[..., -1]
    return kept


def _changed(part: str, change: Callable[[Tensor], Tensor]) -> Alteration:
    """Weights whose names end in `part`, or hold `conv`, changed."""

    def meant(name: str) -> bool:
        return name.endswith(".weight") and "conv" in name if part == "conv" else name.endswith(f".{part}")

    return seeing(change=lambda name, value: change(value) if meant(name) else value)


def _with(**fields: Any) -> Alteration:
    """The model with other hyperparameters."""
    return lambda model: replace(model, **fields)  # type: ignore[type-var]
