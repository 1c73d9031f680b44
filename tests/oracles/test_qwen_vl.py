"""Text models of Qwen VL against transformers, which has them inside image-and-text models only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.synth import SynthSource
from tests.oracles import agree
from tests.oracles.cases import CASES

NAMES = [name for name, case in CASES.items() if case.arch in ("qwen2vl", "qwen3vl", "qwen3vlmoe")]


def same(a: object, b: object) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-6 * abs(b))


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same_of_text(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = SynthSource(case.arch, case.sizes, changes=case.changes)
    write_checkpoint(tmp_path / "own", source, config=source.config)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "own", dtype=torch.float32, output_loading_info=True, **eager
    )
    missing = info.pop("missing_keys")
    assert missing and all(key.startswith("model.visual.") for key in missing)
    assert not {kind: names for kind, names in info.items() if names}

    checkpoint = Checkpoint(tmp_path / "own")
    ids = torch.randint(0, case.sizes.n_vocab, (80,), generator=torch.Generator().manual_seed(1))
    ours = agree.reference_logits(checkpoint, ids)
    assert agree.nmse(ours, agree.oracle_logits(model.eval(), ids)) <= case.transformers

    model.save_pretrained(tmp_path / "again")
    again = Checkpoint(tmp_path / "again")
    assert again.extra == [] and again.tensors.keys() == checkpoint.tensors.keys()
    assert all(name.startswith(("visual.", "model.visual.")) for name in again.ignored)
    was, now = checkpoint.metadata, again.metadata
    assert not {key for key in {*was, *now} if not same(was.get(key), now.get(key))}
    for tensor in checkpoint.tensors:
        assert np.array_equal(again.read(tensor), checkpoint.read(tensor)), tensor
