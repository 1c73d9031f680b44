"""`explain` against captures that the reference made with one step replaced: faults that no file can plant.

llama.cpp cannot be made to take another activation or another router by keys or tensors, so the wrong engine is our own
forward here, with ggml's conventions, altered by hand in this file and not by the hypothesis that has to be found.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffharness.captures import Capture, CaptureWriter
from diffharness.fixture import Fixture, load_fixture
from diffharness.pipeline.reference_runs import conventions_of
from diffharness.records.explain import Explanation
from diffharness.reference import ops
from diffharness.reference.hypotheses import altered
from diffharness.reference.runner import Reference
from diffharness.reference.steps import Steps
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.source import WeightSource
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.explaining import explained


def planted_capture(source: WeightSource, model: Steps, fixture: Fixture, path: Path) -> Capture:
    """Every tap of `model` on the source's weights."""
    reference = Reference(source, model=model, arithmetic=conventions_of(source))
    with CaptureWriter(path, fixture.n_tokens) as writer:
        reference.run(fixture.chunks(), on_tap=lambda tap, own, _, rows: writer.write(tap, rows.start, own.numpy()))
    return Capture(path)


def explain_planted(pair: Pair, steps: dict[str, Any], folder: Path, **more: Any) -> Explanation | None:
    fixture = load_fixture(pair.fixture)
    with open_gguf(pair.gguf) as source:
        model = Reference(source).model
        assert isinstance(model, Steps)
        capture = planted_capture(source, altered(model, **steps), fixture, folder / "planted.safetensors")
    return explained(pair, capture, fixture, **more)


def interleaved_groups(me: Any, plain: Any, il: int, q: Tensor, k: Tensor, v: Tensor, state: Any, *_: Any) -> Tensor:
    times = q.shape[2] // k.shape[2]
    out: Tensor = plain(il, q, k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1), state)
    return out


def seeing_all(me: Any, plain: Any, il: int, q: Tensor, k: Tensor, v: Tensor, state: Any, *_: Any) -> Tensor:
    both = [x.transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*both, scale=me.scores(il).scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def chosen(score: Any, weigh: Any) -> Any:
    def route(me: Any, plain: Any, logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        _, experts = plain(logits)
        return weigh(score(logits).gather(-1, experts)), experts

    return route


def partly_turned(me: Any, plain: Any, il: int, name: str, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = heads.shape[-1] // 2
    exponents = torch.arange(0, n, 2, dtype=torch.float64) / n
    angles = torch.arange(heads.shape[1], dtype=torch.float64)[:, None] * me.rope_base**-exponents
    return ops.apply_rope(heads, angles.cos().float(), angles.sin().float(), interleaved=me.interleaved)


def turned_keys_as_values(me: Any, plain: Any, w: Any, il: int, x: Tensor, cos: Tensor, sin: Tensor, tap: Any) -> Any:
    k, v = plain(w, il, x, cos, sin, tap)
    if not w.has(f"blk.{il}.attn_v.weight"):
        tap("attn_v_norm", k.flatten(-2))
        return k, k
    return k, v


def moved(me: Any, plain: Any, w: Any, il: int, x: Tensor, state: Any) -> Any:
    return plain(w, il, x, replace(state, positions=state.positions + 1))


def same(p: Tensor) -> Tensor:
    return p


# case, the step and what it is replaced by, what has to be said
FAULTS: list[tuple[str, dict[str, Any], str]] = [
    (
        "qwen2",
        {"act": lambda me, plain, x, state: torch.where(x > 0, x * x, 0 * x)},
        "the feed-forward's activation were the square of relu",
    ),
    ("llama", {"act": lambda me, plain, x, s: x.clamp_min(0)}, "the feed-forward's activation were relu"),
    ("gemma3", {"act": lambda me, plain, x, s: x / (1 + (-x).exp())}, "the feed-forward's activation were silu"),
    (
        "gemma2",
        {"act": lambda me, plain, x, s: x / 2 * (1 + torch.erf(x / 2**0.5))},
        "the feed-forward's activation were gelu with erf",
    ),
    (
        "qwen3",
        {"act": lambda me, plain, x, s: x / (1 + (-1.702 * x).exp())},
        "the feed-forward's activation were quick gelu",
    ),
    (
        "mixtral",
        {"gated": lambda me, plain, gate, up, s: F.silu(up) * gate},
        "the activation were applied to up, not to gate",
    ),
    (
        "gemma2",
        {"scores": lambda me, plain, il: replace(plain(il), softcap=None)},
        "attn_logit_softcapping of all layers were absent",
    ),
    ("llama", {"attend": interleaved_groups}, "query head h read KV head h mod 2, and not h // 4"),
    ("qwen3", {"attend": seeing_all}, "queries saw the keys after them"),
    ("mistral", {"turn": partly_turned}, "only the first 16 components of a head turned"),
    (
        "gemma4",  # of all layers it would not even run: the global ones have frequency factors for every pair
        {"rotary": lambda me, plain, il: replace(plain(il), n_rot=16) if me.layer_kind(il) == "sliding" else plain(il)},
        "only the first 16 components of a head turned, of sliding layers",
    ),
    ("qwen2", {"tables": moved}, "positions were one too many"),
    (
        "gemma3",
        {"scores": lambda me, plain, il: replace(plain(il), scale=1.0)},
        "attention scores of all layers were scaled by 1",
    ),
    (
        "gemma2",
        {"scores": lambda me, plain, il: replace(plain(il), window=None if plain(il).window else 16)},
        "the sliding window were on the other layers",
    ),
    (
        "qwen3moe",
        {"route": chosen(lambda x: x.softmax(-1), same)},
        "experts were weighed by their softmax, not normalised",
    ),
    ("qwen3moe", {"route": chosen(torch.sigmoid, same)}, "the router's gate were a sigmoid"),
    (
        "gemma4-experts",
        {"route": chosen(torch.sigmoid, lambda p: p / p.sum(-1, keepdim=True))},
        "the router's gate were a sigmoid, normalised",
    ),
    (
        "qwen3moe-unnormalised",
        {
            "route": lambda me, plain, x, *_: (
                x.topk(me.n_expert_used).values.softmax(-1),
                x.topk(me.n_expert_used).indices,
            )
        },
        "the softmax were taken after the choice of experts, so that their weights sum to one",
    ),
    ("gemma4", {"norm_values": lambda me, plain, w, il, v: v}, "values were not normalised"),
    ("gemma4", {"keys_values": turned_keys_as_values}, "values were the keys after norm and rope"),
    (
        "gemma4",
        {"scale_layer": lambda me, plain, w, il, x, before: before + plain(w, il, x - before, before)},
        "the layer scalar were applied to what the layer adds, and not to the whole residual",
    ),
    (
        "llama",
        {"add": lambda me, plain, x, h: x + 0.37 * h},
        "branches were scaled by 0.37 before they were added to the residual",
    ),
    (
        "gemma4-e",
        {"lender": lambda me, plain, il: 0 if il > plain(il) == 1 else plain(il)},
        "sliding layers without keys and values of their own took them from layer 0, and not from layer 1",
    ),
]


@pytest.mark.parametrize(("case", "steps", "says"), FAULTS, ids=[f"{case}: {says}" for case, _, says in FAULTS])
def test_the_fault_is_named(make_pair: MakePair, tmp_path: Path, case: str, steps: dict[str, Any], says: str) -> None:
    told = explain_planted(make_pair(case), steps, tmp_path)
    assert told is not None and told.found, told
    first = told.hypotheses[0]
    assert says in [row.says for row in told.hypotheses if row is first or row.equal], told.answer
    assert first.places is None and told.facts is None


def test_a_search_keeps_to_its_budget(make_pair: MakePair, tmp_path: Path) -> None:
    """Nothing fits before the budget is spent: the answer says that the search was ended."""
    steps = {"attend": lambda me, plain, il, q, k, v, state, *_: plain(il, q, k, v, state).flip(-1)}
    told = explain_planted(make_pair("llama"), steps, tmp_path, budget=12)
    assert told is not None and not told.found and told.exhausted
    assert told.evaluations <= told.budget == 12 and "ended at its bound of 12" in told.answer


def test_heads_that_differ_are_told(make_pair: MakePair, tmp_path: Path) -> None:
    """Two of eight heads garbled: no hypothesis, but the facts name them."""

    def garbled(me: Any, plain: Any, il: int, q: Tensor, k: Tensor, v: Tensor, state: Any, *_: Any) -> Tensor:
        heads = plain(il, q, k, v, state).unflatten(-1, (q.shape[2], -1)).clone()
        heads[:, :, [2, 5]] = heads[:, :, [2, 5]].cos()
        return heads.flatten(-2)  # type: ignore[no-any-return]

    told = explain_planted(make_pair("llama"), {"attend": garbled}, tmp_path)
    assert told is not None and not told.found and told.facts is not None
    assert told.facts.tap == "blk.0.attn_ctx" and told.facts.heads == [2, 5] and told.facts.n_heads == 8
    assert "of 8 heads 2, 5" in told.answer


def test_rotation_that_differs_is_told(make_pair: MakePair, tmp_path: Path) -> None:
    """Pairs that turn and stretch by no rule: no hypothesis, but their frequencies are measured."""

    def turn(me: Any, plain: Any, il: int, name: str, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        angles = torch.atan2(sin, cos)
        turned: Tensor = plain(il, name, heads, angles.cos(), angles.sin())
        return turned + 0.01 * turned.square()

    told = explain_planted(make_pair("llama"), {"turn": turn}, tmp_path)
    assert told is not None and not told.found and told.facts is not None
    assert told.facts.tap == "blk.0.attn_q_rope"
    assert told.facts.rotation["attn_q"][:4] == pytest.approx([1, 1, 1, 1], abs=0.01)
