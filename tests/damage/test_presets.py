"""The composed damage is what was on record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffharness.damage import FAULTS, Damage
from diffharness.damage.draft import Draft, Target
from diffharness.damage.metadata import parse_set
from diffharness.metrics import cosine
from diffharness.weights.gguf_file import open_gguf
from tests.damage.conftest import N_LAYER, values

Make = Callable[..., Damage]


def test_issue_6056(model: Path, damaged: Make) -> None:
    done = damaged("issue-6056")
    a, b = values(model), values(done.out)
    for il in range(N_LAYER):
        assert b[f"blk.{il}.layer_output_scale.weight"] == 1
        spared = il % 6 in (0, 1)
        for name in (name for name in a if name.startswith(f"blk.{il}.") and a[name].ndim > 1):
            near = 1.0 if spared else 0.45
            assert cosine(a[name], b[name]) == pytest.approx(near, abs=0.03), name
        assert (a[f"blk.{il}.attn_norm.weight"] == b[f"blk.{il}.attn_norm.weight"]).all()


def test_attention_drift(damaged: Make) -> None:
    done = damaged("attention-drift", tensors="blk.*")
    attention = [name for name in done.tensors if any(x in name for x in ("attn_q.", "attn_k.", "attn_v."))]
    assert len(attention) == 18 and len(done.tensors) == 18 + 8, "all that six layers have of attention's, and 8 others"


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("rope-base-lost", "llama.rope.freq_base", None),
        ("rope-base-scaled", "llama.rope.freq_base", 1e6),
        ("rope-half", "llama.rope.dimension_count", 16),
        ("eps-hard-coded", "llama.attention.layer_norm_rms_epsilon", np.float32(1e-2)),
        ("window-scaled", "llama.attention.sliding_window", 32),
        ("experts-used", "llama.expert_used_count", 1),
        ("bos-wrong", "tokenizer.ggml.bos_token_id", 0),
        ("softcap-lost", "llama.final_logit_softcapping", None),
    ],
)
def test_keys(damaged: Make, name: str, key: str, expected: object) -> None:
    with open_gguf(damaged(name).out) as copy:
        assert copy.metadata.get(key) == expected


def test_all_keys_of_scaling(damaged: Make) -> None:
    with open_gguf(damaged("rope-scaling-lost").out) as copy:
        assert not [key for key in copy.metadata if "rope.scaling" in key]


def test_per_layer_keys_are_changed_layer_by_layer() -> None:
    draft = Draft({}, {"general.architecture": "gemma4", "gemma4.rope.dimension_count": [64, 128]}, {}, seed=0)
    edit = FAULTS["rope-half"].plan(draft, Target("rope-half", [], 0.5))
    assert edit.keys == {"gemma4.rope.dimension_count": [32, 64]}


def test_set_takes_each_type() -> None:
    assert parse_set("a.b=str:x=y:z", {}) == ("a.b", "x=y:z")
    assert parse_set("a=bool:true", {"a": "BOOL"}) == ("a", True)
    assert parse_set("a=int:-3", {"a": "UINT64"}) == ("a", -3)
