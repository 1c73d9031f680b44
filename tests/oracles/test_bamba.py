"""Bamba, which GGUF calls `granitehybrid`: its config has none of the keys that the architecture's example has.

Half of each head turns. The engine's converter pairs the rows of whole heads, as for models whose heads turn in whole;
what comes out is another model, and the reference, given such a file, tells as much.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from diffharness.fixture import from_ids, save_fixture
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.names._map import RotaryPairs
from diffharness.weights.names._reorder import PartPairs
from diffharness.weights.source import Float32Array, Overlay
from diffharness.weights.synth import SynthSource
from tests.e2e.conftest import Pair
from tests.e2e.runs import graph_only
from tests.oracles import agree

CHANGES = {
    "model_type": "bamba",
    "architectures": ["BambaForCausalLM"],
    "layer_types": None,
    "attn_layer_indices": [1, 3],
    "partial_rotary_factor": 0.5,
    "num_local_experts": None,
}


class PairedInWhole(Overlay):
    """A checkpoint with the rows of Q and K as the engine's converter arranges them."""

    def read(self, name: str) -> Float32Array:
        n_head = {"attn_q.weight": 4, "attn_k.weight": 2}.get(name.split(".", 2)[-1])
        if n_head is None:
            return super().read(name)
        [as_published] = PartPairs(n_head, 8).to_hf(super().read(name))
        return RotaryPairs(n_head).to_gguf([as_published])


def test_transformers_the_reference_and_the_engine_agree(tmp_path: Path) -> None:
    source = SynthSource("granitehybrid", changes=CHANGES)
    config = {key: value for key, value in source.config.items() if value is not None}
    write_checkpoint(tmp_path / "checkpoint", source, config=config)
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    assert checkpoint.extra == [] and checkpoint.arch == "granitehybrid"
    ids = torch.randint(0, 160, (80,), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    assert agree.nmse(agree.reference_logits(checkpoint, ids), agree.oracle_logits(model.eval(), ids)) <= agree.FLOAT32

    converted = agree.reference_logits(PairedInWhole(checkpoint), ids)
    assert agree.nmse(converted, agree.oracle_logits(model.eval(), ids)) > 1e-2

    gguf, fixture = tmp_path / "model.gguf", tmp_path / "ids.json"
    checkpoint_to_gguf(checkpoint, gguf)
    save_fixture(from_ids(ids.tolist(), name="random", chunk=128), fixture)
    runs = graph_only(Pair(gguf, checkpoint.path, fixture), tmp_path)
    final = runs.conventions or runs.definition
    assert final.ok and final.complete
    assert max(row.nmse_local for row in final.judged if row.nmse_local is not None) <= 1e-8
