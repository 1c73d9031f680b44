"""Mixtures: each scored once, from the first layer that differs, and bit for bit what a whole forward gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness.fixture import from_ids
from diffharness.forensics import groups
from diffharness.forensics.groups import Group, joined
from diffharness.metrics import kl_per_position, nll_per_position
from diffharness.pipeline.mixed_sources import Blend, Exchanged, untied
from diffharness.pipeline.mixtures import Mixtures
from diffharness.pipeline.reference_runs import Precision, logits_of
from diffharness.weights.source import Overlay
from tests.oracles.conftest import Tiny
from tests.oracles.conftest import make_tiny as make_tiny  # a fixture that other folders share
from tests.reference.random_source import LLAMA, RandomSource

IDS = from_ids(np.random.default_rng(0).integers(0, 40, 48).tolist(), chunk=16)
N_LAYER = 3


def mixtures(
    folder: Path, artifact: Any = None, checkpoint: Any = None, *, fixture: Any = IDS, **more: Any
) -> Mixtures:
    artifact = artifact or RandomSource(LLAMA, seed=1)
    checkpoint = checkpoint or RandomSource(LLAMA)
    return Mixtures(artifact, checkpoint, fixture, Precision(), folder, **({"keys": {}} | more))


def some_groups(names: frozenset[str]) -> list[Group]:
    classes = groups.by_class(names)
    layers = groups.by_layer(names)
    return [Group(""), *layers[1:], *classes[::4], joined(classes[:3]), joined(layers[3:])]


@pytest.mark.parametrize("case", ["llama", "qwen3moe", "gemma3", "gemma4", "gemma4-e", "gemma4-experts"])
def test_with_and_without_kept_activations_bit_for_bit(
    make_tiny: Callable[..., Tiny], tmp_path: Path, case: str
) -> None:
    made = make_tiny(case)
    artifact = made.checkpoint
    noise = np.random.default_rng(1)

    class Noisy(Overlay):
        def read(self, name: str) -> Any:
            return super().read(name) * np.float32(1.1)

    checkpoint = Noisy(made.checkpoint)
    fixture = from_ids(made.ids.tolist(), chunk=32)
    kept = mixtures(tmp_path, artifact, checkpoint, fixture=fixture)
    plain = mixtures(tmp_path, artifact, checkpoint, fixture=fixture, reuse=False)
    for group in noise.permutation(np.array(some_groups(kept.names), dtype=object)):
        for one, other in ((kept.of, plain.of), (kept.without, plain.without)):
            assert np.array_equal(one(group).nll, other(group).nll), group.label
            assert np.array_equal(one(group).kl, other(group).kl), group.label
    assert kept.count.forwards == plain.count.forwards
    assert kept.count.layers < plain.count.layers


def test_numbers_are_those_of_the_whole_logits(tmp_path: Path) -> None:
    artifact, checkpoint = RandomSource(LLAMA, seed=1), RandomSource(LLAMA)
    made = mixtures(tmp_path, artifact, checkpoint)
    rows, next_ids = IDS.scored_positions(), IDS.next_ids()
    base = logits_of(checkpoint, IDS, Precision())[rows]
    for group in some_groups(made.names):
        mixed = Overlay(artifact, checkpoint, group.tensors.__contains__)
        logits = logits_of(mixed, IDS, Precision())[rows]
        outcome = made.of(group)
        assert np.allclose(outcome.nll, nll_per_position(logits, next_ids), atol=1e-6)
        assert np.allclose(outcome.kl, kl_per_position(base, logits), atol=1e-6)
    everything = made.of(made.everything)
    assert np.array_equal(everything.nll, made.without(Group("")).nll) and not everything.kl.any()


def test_each_mixture_is_run_once_and_from_where_it_differs(tmp_path: Path) -> None:
    told: list[int] = []
    made = mixtures(tmp_path, told=told.append)
    assert (made.count.forwards, made.count.layers) == (1, N_LAYER)
    made.of(Group(""))
    last = groups.by_layers(made.names, "2", N_LAYER)
    made.of(last)
    made.of(last)
    assert made.is_known(last) and made.count.forwards == 3
    assert made.count.layers == 2 * N_LAYER + 1
    made.of(groups.by_glob(made.names, "output_norm.weight"))
    assert made.count.layers == 2 * N_LAYER + 1, "the head alone"
    made.without(last)
    assert made.count.layers == 2 * N_LAYER + 2
    made.of(groups.by_glob(made.names, "token_embd.weight"))
    assert made.count.layers == 3 * N_LAYER + 2
    assert told == list(range(6))


def test_equal_tensors_make_no_new_mixture(tmp_path: Path) -> None:
    artifact, checkpoint = RandomSource(LLAMA, seed=1), RandomSource(LLAMA)
    artifact.values["blk.1.attn_norm.weight"] = checkpoint.values["blk.1.attn_norm.weight"]
    norm = "blk.1.attn_norm.weight"
    made = mixtures(tmp_path, artifact, checkpoint, equal=frozenset({norm}))
    assert made.of(Group("", frozenset({norm}))) is made.of(Group(""))
    assert made.count.forwards == 2


def test_keys_are_exchanged_too(tmp_path: Path) -> None:
    artifact, checkpoint = RandomSource(LLAMA, seed=1), RandomSource(LLAMA)
    artifact.metadata["llama.rope.freq_base"] = 10.0
    made = mixtures(tmp_path, artifact, checkpoint, keys={"llama.rope.freq_base": 1000.0})
    (key,) = groups.of_keys(["llama.rope.freq_base"])
    repaired = logits_of(Overlay(artifact, metadata=checkpoint.metadata), IDS, Precision())[IDS.scored_positions()]
    assert np.allclose(made.of(key).nll, nll_per_position(repaired, IDS.next_ids()), atol=1e-6)
    assert not np.array_equal(made.of(key).nll, made.of(Group("")).nll)
    assert not made.of(made.everything).kl.any()
    assert made.without(key).kl.any()


def test_a_tied_head_on_one_side_is_exchanged_as_a_head(tmp_path: Path) -> None:
    tied, own = RandomSource(LLAMA), RandomSource(LLAMA, seed=1)
    own.values["output.weight"] = RandomSource(LLAMA, seed=2).values["token_embd.weight"]
    for artifact, checkpoint in ((tied, own), (own, tied)):
        ours, theirs = untied(artifact, checkpoint)
        assert "output.weight" in ours.tensors and "output.weight" in theirs.tensors
        made = mixtures(tmp_path, artifact, checkpoint)
        expected = nll_per_position(logits_of(checkpoint, IDS, Precision())[IDS.scored_positions()], IDS.next_ids())
        assert np.allclose(made.of(made.everything).nll, expected, atol=1e-6)
        embedding = made.of(groups.by_glob(made.names, "token_embd.weight"))
        head = made.of(groups.by_glob(made.names, "output.weight"))
        assert not np.array_equal(embedding.nll, head.nll)
    assert untied(tied, tied) == (tied, tied)


def test_a_tensor_that_the_checkpoint_lacks_goes_with_its_class() -> None:
    artifact, checkpoint = RandomSource(LLAMA, seed=1), RandomSource(LLAMA)
    name = "blk.0.attn_q.bias"
    artifact.values[name] = np.ones(32, dtype=np.float32)
    mixed = Exchanged(artifact, checkpoint, frozenset({name}), artifact.metadata)
    assert name not in mixed.tensors and name in Exchanged(artifact, checkpoint, frozenset(), {}).tensors


def test_a_little_of_every_difference(tmp_path: Path) -> None:
    artifact, checkpoint = RandomSource(LLAMA, seed=1), RandomSource(LLAMA)
    blend = Blend(artifact, checkpoint, 0.25)
    name = "blk.1.ffn_up.weight"
    expected = 0.75 * checkpoint.values[name] + 0.25 * artifact.values[name]
    assert np.allclose(blend.read(name), expected, atol=1e-6)
    assert np.allclose(blend.take(name, slice(2, 5)), expected[2:5], atol=1e-6)
    made = mixtures(tmp_path, artifact, checkpoint)
    whole, forwards = made.of(Group("")), made.count.forwards
    small = made.towards(blend)
    assert small.of(Group("")).kl_mean < whole.kl_mean
    assert np.array_equal(small.of(small.everything).nll, made.of(made.everything).nll)
    assert made.count.forwards == small.count.forwards == forwards + 1, "what is known of the checkpoint is known"
    assert made.of(Group("")) is whole


def test_no_activations_are_kept_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffharness.pipeline.mixtures._SHARE_OF_DISK", 0.0)
    made = mixtures(tmp_path)
    made.of(groups.by_layers(made.names, "2", N_LAYER))
    assert made.count.layers == 2 * N_LAYER
