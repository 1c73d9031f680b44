"""Layers that attend to another layer's keys and values, and files that have some of their own for them, too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from diffharness.fixture import from_ids, save_fixture
from diffharness.reference.runner import Reference
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.synth import SynthSource
from tests.e2e.conftest import Pair
from tests.e2e.runs import graph_only
from tests.oracles.conftest import Tiny

UNUSED = {"attn_k.weight": "k_proj", "attn_v.weight": "v_proj", "attn_k_norm.weight": "k_norm"}


def test_unused_keys_are_no_unread_tensors(make_tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    """Were they unread, a failing graph leg would accuse nobody. Neither side has a use for them."""
    made = make_tiny("gemma4-e")
    stored = load_file(made.folder / "model.safetensors")
    for name in UNUSED.values():
        lent = next(each for each in stored if each.endswith(f"layers.2.self_attn.{name}.weight"))
        stored[lent.replace("layers.2.", "layers.5.")] = 3 * stored[lent]
    shutil.copy(made.folder / "config.json", tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint_to_gguf(Checkpoint(tmp_path), tmp_path / "model.gguf")
    save_fixture(from_ids(made.ids.tolist(), name="random", chunk=128), tmp_path / "ids.json")
    runs = graph_only(Pair(tmp_path / "model.gguf", tmp_path, tmp_path / "ids.json"), tmp_path)
    with open_gguf(tmp_path / "model.gguf") as artifact:
        assert {f"blk.5.{name}" for name in UNUSED} <= artifact.tensors.keys()
    assert runs.unread == [] and (runs.conventions or runs.definition).ok


def test_only_keys_and_values_of_layers_that_borrow_are_left_alone(make_tiny: Callable[..., Tiny]) -> None:
    models = [Reference(make_tiny("gemma4-e").checkpoint).model, Reference(SynthSource("gemma3n")).model]
    for model in models:
        first, last = model.n_layer - model.n_shared_kv, model.n_layer - 1  # type: ignore[attr-defined]
        for name in UNUSED:
            assert model.leaves_alone(f"blk.{last}.{name}") and model.leaves_alone(f"blk.{first}.{name}")
            assert not model.leaves_alone(f"blk.{first - 1}.{name}") and not model.leaves_alone(
                f"blk.{last + 1}.{name}"
            )
        assert not model.leaves_alone(f"blk.{last}.attn_q.weight") and not model.leaves_alone("output.weight")
