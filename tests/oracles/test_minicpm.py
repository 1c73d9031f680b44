"""MiniCPM's files of before the keys for its scales."""

from __future__ import annotations

from pathlib import Path

import torch

from diffharness.fixture import from_ids, save_fixture
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.synth import SynthSource
from tests.e2e.conftest import Pair
from tests.e2e.runs import graph_only
from tests.oracles import agree

FIRST_MODELS = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "rope_scaling": None}
SCALES = ("embedding_scale", "residual_scale", "logit_scale")


def test_the_engine_multiplies_logits_of_old_files_by_what_it_should_divide_by(tmp_path: Path) -> None:
    """The model's code divides the last state by width / 256; without the key the engine divides by 256 / width."""
    source = SynthSource("minicpm", changes=FIRST_MODELS)
    write_checkpoint(tmp_path / "model", source, config=source.config)
    ids = torch.randint(0, 160, (24,), generator=torch.Generator().manual_seed(1))
    save_fixture(from_ids(ids.tolist(), name="random", chunk=32), tmp_path / "ids.json")
    checkpoint = Checkpoint(tmp_path / "model")
    stated = agree.reference_logits(checkpoint, ids)
    checkpoint_to_gguf(checkpoint, tmp_path / "new.gguf")
    assert graph_only(Pair(tmp_path / "new.gguf", tmp_path / "model", tmp_path / "ids.json"), tmp_path).definition.ok

    for key in SCALES:
        checkpoint._metadata.pop(f"minicpm.{key}")
    checkpoint_to_gguf(checkpoint, tmp_path / "old.gguf")
    with open_gguf(tmp_path / "old.gguf") as old:
        assert f"minicpm.{SCALES[2]}" not in old.metadata
        assert torch.allclose(agree.reference_logits(old, ids), stated, rtol=1e-5, atol=1e-6)
    runs = graph_only(Pair(tmp_path / "old.gguf", tmp_path / "model", tmp_path / "ids.json"), tmp_path)
    assert [row.tap for row in (runs.conventions or runs.definition).failing] == ["logits"]
