"""Gemma 3n: with the engine's standard deviation of gates, and nothing else changed, the reference is the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from diffharness.engine.runner import Engine
from diffharness.engine.strict import strict_settings, write_strict
from diffharness.fixture import from_ids
from diffharness.pipeline.reference_runs import Precision, conventions_of, graph_pass
from diffharness.reference.archs.gemma3n import Gemma3n
from diffharness.settings import load_tolerances
from diffharness.taps import split
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.synth import SynthSource
from tests.e2e.runs import NATIVE
from tests.oracles import agree

SPARSE = 10  # layers


class _OneLess(Gemma3n):
    """The deviation of a sample: divided by one less than the number of gates."""

    def spread(self, gate: Tensor) -> Tensor:
        return gate.std(dim=-1, keepdim=True, unbiased=True)


def test_only_the_deviation_of_gates_differs(tmp_path: Path) -> None:
    source = SynthSource("gemma3n")
    write_checkpoint(tmp_path / "hf", source, config=source.config)
    checkpoint_to_gguf(Checkpoint(tmp_path / "hf"), tmp_path / "model.gguf")
    fixture = from_ids(np.random.default_rng(1).integers(0, 160, 80).tolist(), name="random", chunk=128)
    settings, tolerances = strict_settings(NATIVE), load_tolerances()
    floors = {name: tolerances[name] for name in tolerances.floors}
    with open_gguf(tmp_path / "model.gguf") as artifact:
        strict = write_strict(artifact, artifact, tmp_path / "strict.gguf")
        captured = Engine(settings).capture(strict, fixture.chunks(), tmp_path / "strict.safetensors").open()
        results = [
            graph_pass(
                artifact,
                captured,
                fixture,
                floors,
                precision=Precision(),
                n_ubatch=settings.n_ubatch,
                arithmetic=conventions_of(artifact),
                model=kind.from_metadata(artifact.metadata),
            ).result
            for kind in (Gemma3n, _OneLess)
        ]
    defined, as_the_engine = results
    assert {split(row.tap) for row in defined.failing} == {
        (il, tap) for il in range(SPARSE) for tap in ("ffn_out", "ffn_post_norm", "layer_out")
    }
    assert as_the_engine.ok and as_the_engine.complete
    assert max(row.nmse_local for row in as_the_engine.judged if row.nmse_local is not None) <= 1e-8


def test_fewer_per_layer_embeddings_than_tokens(tmp_path: Path) -> None:
    n_rows, name = 150, "per_layer_token_embd.weight"
    changes = {"vocab_size_per_layer_input": n_rows, "laurel_rank": 24, "hidden_size_per_layer_input": 16}
    source = SynthSource("gemma3n", changes=changes)
    write_checkpoint(tmp_path, source, config=source.config)
    checkpoint = Checkpoint(tmp_path)
    whole = checkpoint.read(name)
    assert len(whole) == 160 and whole[:n_rows].any(axis=1).all() and not whole[n_rows:].any()
    assert np.array_equal(whole, source.read(name)) and checkpoint.by_rows(name)
    for rows in (slice(140, 155), np.array([159, 3, 149, 150])):
        assert np.array_equal(checkpoint.take(name, rows), whole[rows])

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(0, n_rows, (80,), generator=torch.Generator().manual_seed(1))
    assert agree.nmse(agree.reference_logits(checkpoint, ids), agree.oracle_logits(model, ids)) <= agree.FLOAT32
