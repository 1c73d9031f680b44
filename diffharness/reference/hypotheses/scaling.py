"""Scales and caps outside of attention: embedding, branches and residual, layer scalars, logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffharness.reference.hypotheses import _fit
from diffharness.reference.hypotheses._altering import altered, seeing, with_logits
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.model import Weights
from diffharness.reference.steps import Steps

EMBEDDING, LOGITS = frozenset({"token_embd"}), frozenset({"logits"})
RESIDUAL = frozenset({"ffn_in", "layer_out"})
OUT = frozenset({"layer_out"})
_FITTED = 1 << 17  # logits that a number is fitted to
_SHARE = 0.5  # of the error that a fitted number must take away to be worth a trial


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on scales and caps."""
    if scene.place == "embed":
        yield from _embedding(scene)
    elif scene.place == "head":
        yield from _logits(scene)
    else:
        yield from _residual(scene)
        if hasattr(scene.model, "scale_layer"):
            yield from _scalars(scene)
        if getattr(scene.model, "n_embd_per_layer", 0):
            says = "per-layer embeddings were left out"
            yield Hypothesis(
                "scaling.per-layer-absent", says, OUT,
                lambda model: altered(model, own_embedding=lambda me, plain, w, blk, x, *told: torch.zeros_like(x)),
            )  # fmt: skip


# -- embedding ----------------------------------------------------------------------------------------


def _embedding(scene: Scene) -> Iterator[Hypothesis]:
    root = math.sqrt(scene.model.n_embd)
    plain_scale = float(scene.model.scale_embedding(torch.ones(1, dtype=torch.float64)))
    if plain_scale != 1:
        yield _embedded("embedding-scale-absent", "the embedding scale were absent", 1.0)
        yield _embedded("embedding-scale-twice", "the embedding scale were applied twice", plain_scale**2)
        rounded = float(torch.tensor(plain_scale, dtype=torch.bfloat16))
        yield _embedded("embedding-scale-bf16", f"the embedding scale were rounded to bfloat16 ({rounded:g})", rounded)
    else:
        yield _embedded("embedding-scale", f"embeddings were scaled by sqrt({scene.model.n_embd})", root)
    ours, engine = scene.ours.get("token_embd"), scene.engine.get("token_embd")
    if ours is not None and engine is not None:
        scale = _fit.nice(plain_scale * _fit.ratio(engine, ours))
        yield _embedded("embedding-scale", f"embeddings were scaled by {scale:.6g}, not {plain_scale:.6g}", scale, 1)


def _embedded(name: str, says: str, scale: float, fitted: int = 0) -> Hypothesis:
    return Hypothesis(
        f"scaling.{name}", says, EMBEDDING,
        lambda model: altered(model, scale_embedding=lambda me, plain, x: x * scale), fitted,
    )  # fmt: skip


# -- residual -----------------------------------------------------------------------------------------


def _residual(scene: Scene) -> Iterator[Hypothesis]:
    def added(name: str, says: str, add: Callable[[Tensor, Tensor], Tensor], fitted: int = 0) -> Hypothesis:
        return Hypothesis(
            f"scaling.{name}",
            says,
            RESIDUAL,
            lambda model: altered(model, add=lambda me, plain, x, h: add(x, h)),
            fitted,
        )

    yield added("residual-absent", "branches replaced the residual, and were not added to it", lambda x, h: h)
    yield added("branch-absent", "what branches made were not added to the residual", lambda x, h: x)
    yield added(
        "branch-root", "sums of residual and branch were divided by sqrt(2)", lambda x, h: (x + h) / math.sqrt(2)
    )
    own = float(scene.model.add(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)))
    if own != 1:
        yield added("residual-scale-absent", "the residual scale were absent", lambda x, h: x + h)
        says = "the residual scale were applied twice"
        yield added("residual-scale-twice", says, lambda x, h: x + own * own * h)
    depth = scene.model.n_layer
    for scale, words in (
        (0.5, "0.5"),
        (depth**-0.5, f"1/sqrt({depth}), of the layers"),
        (1 / depth, f"1/{depth}, of the layers"),
    ):
        says = f"branches were scaled by {words} before they were added to the residual"
        yield added("residual-scale", says, lambda x, h, s=scale: x + s * h)  # type: ignore[misc]
    sums = {"ffn_in": ("input", ("attn_post_norm", "attn_out")), "layer_out": ("ffn_in", ("ffn_post_norm", "ffn_out"))}
    before, branches = sums.get(scene.tap, ("", ()))
    x, engine = scene.ours.get(before), scene.engine.get(scene.tap)
    h = next((scene.ours[tap] for tap in branches if tap in scene.ours), None)
    if x is None or h is None or engine is None:
        return
    scale = _fit.nice(_fit.ratio(engine - x, h))
    if abs(scale - own) > 1e-4:
        says = f"branches were scaled by {scale:.6g} before they were added to the residual"
        yield added("residual-scale", says, lambda x, h: x + scale * h, 1)
    whole = _fit.nice(_fit.ratio(engine, scene.ours[scene.tap]))
    if abs(whole - 1) > 1e-4 and _fit.nmse(engine, scene.ours[scene.tap] * whole) < _SHARE * _fit.nmse(
        engine, scene.ours[scene.tap]
    ):
        says = f"the residual were scaled by {whole:.6g} after each sum"
        yield added("sum-scale", says, lambda x, h: whole * (x + h), 1)


# -- layer scalars (Gemma 4) --------------------------------------------------------------------------


def _scalars(scene: Scene) -> Iterator[Hypothesis]:
    if not scene.has("layer_output_scale.weight"):
        return

    def scaled(name: str, says: str, scale: Callable[[Weights, int, Tensor, Tensor, Tensor], Tensor]) -> Hypothesis:
        def step(me: Steps, plain: Any, w: Weights, il: int, x: Tensor, came_in: Tensor) -> Tensor:
            return scale(w, il, x, came_in, w.get(f"blk.{il}.layer_output_scale.weight"))

        return Hypothesis(f"scaling.{name}", says, OUT, lambda model: altered(model, scale_layer=step))

    yield scaled("scalar-absent", "the layer scalars were absent", lambda w, il, x, before, s: x)
    says = "the layer scalar were applied to what the layer adds, and not to the whole residual"
    yield scaled("scalar-branch", says, lambda w, il, x, before, s: before + s * (x - before))
    yield scaled("scalar-twice", "the layer scalars were applied twice", lambda w, il, x, before, s: x * s * s)
    yield scaled("scalar-inverted", "the residual were divided by the layer scalars", lambda w, il, x, before, s: x / s)
    yield scaled(
        "scalar-root", "the roots of the layer scalars were applied", lambda w, il, x, before, s: x * s.abs().sqrt()
    )
    n_layer = scene.model.n_layer
    for by, word in ((1, "next"), (-1, "previous")):
        says = f"each layer's scalar were that of the {word} layer"
        yield scaled(
            "scalar-of-other", says,
            lambda w, il, x, before, s, by=by: x * w.get(f"blk.{(il + by) % n_layer}.layer_output_scale.weight"),  # type: ignore[misc]
        )  # fmt: skip


# -- logits -------------------------------------------------------------------------------------------


def _logits(scene: Scene) -> Iterator[Hypothesis]:
    own: float | None = getattr(scene.model, "softcap", None)
    ours, engine = scene.ours.get("logits"), scene.engine.get("logits")
    if own is not None:
        yield _capped("softcap-absent", "final_logit_softcapping were absent", own, None)
        yield _capped("softcap-doubled", f"final_logit_softcapping were {2 * own:g}, twice the model's", own, 2 * own)
        yield _capped("softcap-halved", f"final_logit_softcapping were {own / 2:g}, half the model's", own, own / 2)
        yield Hypothesis(
            "scaling.softcap-twice", "final_logit_softcapping were applied twice", LOGITS,
            with_logits(lambda x: torch.tanh(x / own) * own),
        )  # fmt: skip
    for cap in (30.0, 50.0):
        if cap != own:
            yield _capped("softcap", f"final_logit_softcapping were {cap:g}", own, cap)
    scale: float = getattr(scene.model, "logit_scale", 1.0)
    if scale != 1:
        says = "the scale of the logits were absent"
        yield Hypothesis("scaling.logit-scale-absent", says, LOGITS, lambda model: replace(model, logit_scale=1.0))  # type: ignore[type-var]
    yield from _head(scene)
    if ours is None or engine is None:
        return
    step = max(1, ours.numel() // _FITTED)
    ours, engine = ours.flatten()[::step], engine.flatten()[::step]
    uncapped = ours.double() if own is None else torch.atanh((ours.double() / own).clamp(-1 + 1e-12, 1 - 1e-12)) * own
    before = _fit.nmse(engine, ours)
    largest = float(engine.double().abs().max())
    if math.isfinite(largest) and largest > 0:
        cap = _fit.minimum(lambda c: _fit.nmse(engine, torch.tanh(uncapped / c) * c), largest * 0.9, largest * 1000)
        if _fit.nmse(engine, torch.tanh(uncapped / cap) * cap) < _SHARE * before:
            cap = _fit.nice(cap, 1e-4)
            yield _capped("softcap", f"final_logit_softcapping were {cap:.6g}", own, cap, 1)
    scale = _fit.ratio(engine, ours)
    if abs(scale - 1) > 1e-5 and math.isfinite(scale):
        scale = _fit.nice(scale)
        yield Hypothesis(
            "scaling.logit-scale",
            f"logits were multiplied by {scale:.6g}",
            LOGITS,
            with_logits(lambda x: x * scale),
            True,
        )


def _capped(name: str, says: str, own: float | None, cap: float | None, fitted: int = 0) -> Hypothesis:
    taps = LOGITS
    if own is not None:
        return Hypothesis(f"scaling.{name}", says, taps, lambda model: replace(model, softcap=cap), fitted)  # type: ignore[type-var]
    assert cap is not None, "a model without a cap can only get one"
    return Hypothesis(f"scaling.{name}", says, taps, with_logits(lambda x: torch.tanh(x / cap) * cap), fitted)


def _head(scene: Scene) -> Iterator[Hypothesis]:
    w = scene.weights
    if w.has("output.weight") and w.n_rows("output.weight") == w.n_rows("token_embd.weight"):
        says = "the head were tied to the embedding"
        tied = seeing(rename=lambda name: None if name == "output.weight" else name)
        yield Hypothesis("head.tied", says, LOGITS, tied)
    root = math.sqrt(scene.model.n_embd)
    for scale, words in ((root, "multiplied"), (1 / root, "divided")):
        says = f"logits were {words} by sqrt({scene.model.n_embd})"
        yield Hypothesis("scaling.logit-scale", says, LOGITS, with_logits(lambda x, s=scale: x * s))  # type: ignore[misc]
    for by, words in ((1, "one row late"), (-1, "one row early")):
        says = f"the head's rows were read {words}"
        yield Hypothesis("head.rows", says, LOGITS, with_logits(lambda x, by=by: x.roll(by, dims=-1)))  # type: ignore[misc]
