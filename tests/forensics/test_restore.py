"""Ladders and the marks of lineage, on outcomes whose making is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffharness.forensics.drift import Drift, TensorError
from diffharness.forensics.groups import Group
from diffharness.forensics.restore import (
    Outcome,
    Rung,
    additivity,
    is_other_lineage,
    is_spread,
    is_too_short,
    ladder,
    lost_more,
    told,
)
from diffharness.paired import paired
from diffharness.settings import load_tolerances

FLOORS = load_tolerances()
N, CHUNK = 512, 128
CHUNK_OF = np.arange(N) // CHUNK
TEXT = np.random.default_rng(0).gamma(2.0, 1.0, N)  # what each token costs anybody
GROUPS = [Group(name, frozenset({name})) for name in ("a", "b", "c", "d", "e")]


def outcome(effect: float, kl: float | None = None, *, seed: int = 1, noise: float = 0.02) -> Outcome:
    """NLL raised by `effect` on average."""
    random = np.random.default_rng([seed, int(1e6 * abs(effect))])
    nll = TEXT + effect + random.normal(0, noise, N)
    return Outcome(nll, np.full(N, abs(effect) if kl is None else kl))


CHECKPOINT = Outcome(TEXT, np.zeros(N))
CONTROL = outcome(0.002, 1e-3)


def rungs(effects: dict[str, float], base: Outcome, kl: dict[str, float] | None = None) -> list[Rung]:
    """One rung per group; `effects` are on top of the base."""

    def evaluate(exchanged: frozenset[Group]) -> Outcome:
        (group,) = exchanged
        mean = float((base.nll - TEXT).mean())
        made = outcome(mean + effects[group.label], None if kl is None else kl[group.label], seed=2)
        return base if effects[group.label] == 0 else made

    return ladder(GROUPS, evaluate, base, CHUNK_OF, FLOORS)


def alike(effect: float) -> dict[str, float]:
    return {group.label: effect * (1 + 0.1 * i) for i, group in enumerate(GROUPS)}


# -- ladders -------------------------------------------------------------------------------------------


def test_a_ladder_is_sorted_and_noise_decides_nothing() -> None:
    effects = {"a": -1.0, "b": 0.5, "c": 0.0, "d": 1e-4, "e": -0.3}
    found = rungs(effects, outcome(2.0))
    assert [rung.group.label for rung in found][:2] == ["a", "e"] and found[-1].group.label == "b"
    assert {rung.group.label: rung.told for rung in found} == {
        "a": "better", "e": "better", "b": "worse", "c": "same", "d": "same",
    }  # fmt: skip
    assert not next(rung for rung in found if rung.group.label == "c").moved
    assert found[0].change.mean == pytest.approx(-1.0, abs=0.01)


def test_too_few_positions_tell_nothing() -> None:
    short, base = outcome(1.0), CHECKPOINT
    change = paired(short.nll[:40], base.nll[:40], CHUNK_OF[:40])
    assert is_too_short(change) and told(change, FLOORS) == "same"
    assert not is_too_short(paired(short.nll, base.nll, CHUNK_OF))


def test_what_is_not_finite_is_worse_and_its_repair_better() -> None:
    broken = Outcome(np.where(np.arange(N) == 7, np.inf, TEXT), np.full(N, np.inf))
    assert told(paired(broken.nll, TEXT, CHUNK_OF), FLOORS) == "worse"
    assert told(paired(TEXT, broken.nll, CHUNK_OF), FLOORS) == "better"
    assert told(paired(broken.nll, broken.nll, CHUNK_OF), FLOORS) == "same"
    found = ladder(GROUPS, lambda g: CHECKPOINT if GROUPS[3] in g else broken, broken, CHUNK_OF, FLOORS)
    assert found[0].group.label == "d" and found[0].told == "better"


def test_loss_is_judged_by_mean_and_median() -> None:
    assert not lost_more(outcome(0.0, 3.9e-3), CONTROL, FLOORS) and lost_more(outcome(0.0, 5e-3), CONTROL, FLOORS)
    one = Outcome(TEXT, np.where(np.arange(N) == 7, 10.0, 1e-3))
    assert not lost_more(one, CONTROL, FLOORS), "one position is not a loss throughout"
    assert lost_more(Outcome(TEXT, np.full(N, np.inf)), CONTROL, FLOORS)


# -- lineage -------------------------------------------------------------------------------------------


def test_independent_differences_add_up() -> None:
    """Noise or quantization in every matrix: parts do harm by themselves, restoring each helps."""
    whole = outcome(0.05, 0.05)
    harms = rungs(alike(0.01), CHECKPOINT, dict.fromkeys("abcde", 0.01))
    assert additivity(harms, whole, None) == pytest.approx(1.0)
    found = is_other_lineage(rungs(alike(-0.01), whole), harms, whole, FLOORS, spread=True, control=CONTROL)
    assert found.mark is None and found.additivity == pytest.approx(1.0, abs=0.01)


def test_trained_differences_grow_with_the_square() -> None:
    """Training moved all parts in one direction: of five, each alone has a 25th of the whole's KL."""
    whole = outcome(0.01, 0.05)
    harms = rungs(alike(-0.001), CHECKPOINT, dict.fromkeys("abcde", 0.05 / 25))
    restored = rungs(alike(-0.002), whole)
    found = is_other_lineage(restored, harms, whole, FLOORS, spread=True)
    assert found.mark == "coherent" and found.additivity == pytest.approx(0.2)
    assert is_other_lineage(restored, harms, whole, FLOORS, spread=False).mark is None
    assert is_other_lineage(restored, harms, whole, FLOORS, spread=True, small=1.0).mark is None


def test_large_damage_is_judged_by_what_a_little_of_it_does() -> None:
    whole = outcome(2.0, 2.0)  # far beyond where KL goes with the square
    harms = rungs(alike(0.1), CHECKPOINT, dict.fromkeys("abcde", 0.1))
    assert is_other_lineage(rungs(alike(-0.3), whole), harms, whole, FLOORS, spread=True, small=0.95).mark is None


def test_parts_of_another_model_fit_nowhere() -> None:
    whole = outcome(0.2, 0.2)
    harms, restored = rungs(alike(3.0), CHECKPOINT), rungs(alike(2.0), whole)
    assert is_other_lineage(restored, harms, whole, FLOORS, spread=True).mark == "misfit"
    equal = outcome(0.002, 1e-3)  # the same function in another basis
    assert is_other_lineage(rungs(alike(2.0), equal), harms, equal, FLOORS, spread=True, control=CONTROL).mark
    one_better = rungs(alike(2.0) | {"c": -0.5}, whole)
    assert is_other_lineage(one_better, harms, whole, FLOORS, spread=True).mark is None
    harmless = rungs(alike(0.001), CHECKPOINT)
    assert is_other_lineage(restored, harmless, whole, FLOORS, spread=True).mark != "misfit"


def test_two_parts_are_too_few_to_tell() -> None:
    whole = outcome(0.01, 0.05)
    effects = {"a": 0.01, "b": 0.01, "c": 0.0, "d": 0.0, "e": 0.0}
    harms = rungs(effects, CHECKPOINT, {"a": 0.002, "b": 0.002, "c": 0, "d": 0, "e": 0})
    assert is_other_lineage(rungs(effects, whole), harms, whole, FLOORS, spread=True).mark is None


# -- where the tensors differ --------------------------------------------------------------------------


def tensors(n_layer: int = 4, *, beyond: float = 0.02, cos: float = 0.99) -> list[TensorError]:
    """Every matrix beyond its limit."""
    plain = TensorError("", "Q4_K", (8, 8), beyond, 5e-3, cos, 0, 0, 0, 1e-2)
    names = ("attn_q", "attn_output", "ffn_up", "ffn_down")
    return [replace(plain, name=f"blk.{il}.{name}.weight") for il in range(n_layer) for name in names]


def test_spread() -> None:
    every = tensors()
    assert is_spread(Drift(every, [], []), FLOORS, logits_moved=True)
    clean = [replace(t, error=5e-3, cos=0.997) for t in every]
    assert not is_spread(Drift(clean, [], []), FLOORS, logits_moved=True)
    but_one_layer = [clean[i] if t.layer == 2 else t for i, t in enumerate(every)]
    assert not is_spread(Drift(but_one_layer, [], []), FLOORS, logits_moved=True)
    one_class = [t if "ffn_up" in t.name else clean[i] for i, t in enumerate(every)]
    assert not is_spread(Drift(one_class, [], []), FLOORS, logits_moved=True)
    three = [clean[i] if "attn_q" in t.name else t for i, t in enumerate(every)]
    assert is_spread(Drift(three, [], []), FLOORS, logits_moved=True)
    rescaled = tensors(cos=0.998)
    assert not is_spread(Drift(rescaled, [], []), FLOORS, logits_moved=True)
