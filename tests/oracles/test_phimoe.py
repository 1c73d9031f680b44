"""What llama.cpp computes for `phimoe`: RMSNorm for LayerNorm, Mixtral's routing; so changed, the reference agrees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffharness.fixture import from_ids, save_fixture
from diffharness.reference import archs, moe, ops
from diffharness.reference.archs.phimoe import PhiMoe
from diffharness.reference.model import Weights
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.synth import SynthSource
from tests.e2e.conftest import Pair
from tests.e2e.runs import graph_only


@dataclass(frozen=True, kw_only=True)
class AsTheEngine(PhiMoe):
    def norm(self, w: Weights, name: str | None, x: Tensor) -> Tensor:
        assert name is not None
        return ops.rms_norm(x, w.get(name), self.eps) + w.get(name.removesuffix("weight") + "bias")

    def route(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return moe.route(logits, self.n_expert_used, normalise=True)


def test_the_engine_has_another_norm_and_another_routing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SynthSource("phimoe")
    write_checkpoint(tmp_path / "checkpoint", source, config=source.config)
    gguf, ids = tmp_path / "model.gguf", tmp_path / "ids.json"
    checkpoint_to_gguf(Checkpoint(tmp_path / "checkpoint"), gguf)
    save_fixture(from_ids(np.random.default_rng(1).integers(0, 160, 80).tolist(), name="random", chunk=128), ids)
    monkeypatch.setitem(archs.BUILD, "phimoe", AsTheEngine.from_metadata)
    runs = graph_only(Pair(gguf, tmp_path / "checkpoint", ids), tmp_path)
    assert (runs.conventions or runs.definition).ok


def test_routing_weighs_each_expert_among_those_near_it() -> None:
    model = AsTheEngine.from_metadata(SynthSource("phimoe").metadata)
    logits = torch.tensor([4.0, 3.9, 1.0, -2.0])  # nearer than 30 %: the first two; then nobody is near the second
    weights, experts = PhiMoe.route(model, logits)
    assert experts.tolist() == [0, 1]
    assert weights.tolist() == pytest.approx([1 / (1 + np.exp(-0.1)), 1.0])
