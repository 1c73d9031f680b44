"""Models altered step by step: the change is there, the rest is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffharness.reference.archs import build
from diffharness.reference.hypotheses import altered, only_at
from diffharness.reference.hypotheses._altering import seeing, with_logits, with_scores
from diffharness.reference.model import State
from diffharness.reference.runner import Reference
from diffharness.reference.steps import Steps
from tests.reference.random_source import LLAMA, RandomSource

IDS = [torch.randint(0, 40, (16,), generator=torch.Generator().manual_seed(0)).numpy()]


def logits(model: Steps | None, source: RandomSource | None = None) -> Tensor:
    out = Reference(source or RandomSource(LLAMA), model=model).run(IDS)
    assert out is not None
    return out


def model() -> Steps:
    made = build(LLAMA)
    assert isinstance(made, Steps)
    return made


def test_a_step_that_is_left_as_it_was_changes_nothing() -> None:
    same = altered(model(), act=lambda me, plain, gate, state: plain(gate, state))
    assert torch.equal(logits(same), logits(None)) and type(same) is not type(model())


def test_alterations_go_on_top_of_one_another() -> None:
    once = altered(model(), act=lambda me, plain, gate, state: 2 * plain(gate, state))
    twice = altered(once, act=lambda me, plain, gate, state: plain(gate, state) / 2)
    assert torch.allclose(logits(twice), logits(None), atol=1e-5)
    assert not torch.allclose(logits(once), logits(None), atol=1e-2)


def test_a_step_calls_altered_steps() -> None:
    doubled = altered(model(), act=lambda me, plain, gate, state: 2 * plain(gate, state))
    assert torch.allclose(
        doubled.gated(torch.ones(1), torch.ones(1), State(torch.arange(1))), 2 * torch.nn.functional.silu(torch.ones(1))
    )


def test_an_unknown_step_is_an_error() -> None:
    with pytest.raises(AttributeError):
        altered(model(), no_such_step=lambda me, plain: None)


def test_only_some_places() -> None:
    base, other = model(), with_logits(lambda x: x * 3)(model())
    assert torch.equal(logits(only_at(base, other, {0, 1})), logits(None))
    assert torch.equal(logits(only_at(base, other, {"head"})), 3 * logits(None))


def test_scores_by_layer() -> None:
    changed = with_scores(lambda s: type(s)(1.0), lambda il: il == 1)(model())
    assert [changed.scores(il).scale for il in range(3)] == [model().scores(0).scale, 1.0, model().scores(2).scale]


def test_weights_seen_otherwise() -> None:
    hidden = seeing(rename=lambda name: None if name == "output.weight" else name)(model())
    source = RandomSource(LLAMA, drop=())
    source.values["output.weight"] = source.values["token_embd.weight"][::-1].copy()
    tied = RandomSource(LLAMA)
    tied.values.pop("output.weight", None)
    assert torch.equal(logits(hidden, source), logits(None, tied))
    doubled = seeing(change=lambda name, value: value + 1 if name == "output_norm.weight" else value)(model())
    source = RandomSource(LLAMA)
    source.values["output_norm.weight"] = source.values["output_norm.weight"] + 1
    assert torch.allclose(logits(doubled), logits(None, source))
