from __future__ import annotations

import numpy as np

from diffharness.errors import ArtifactFileError
from diffharness.forensics.metadata import differences, repaired, same

BASE = {
    "general.architecture": "m",
    "m.rope.freq_base": 1e4,
    "m.eps": 1e-6,
    "m.context_length": 8192,
    "m.pattern": [True, False],
}


def effect(metadata):
    """A forward that reads three keys, one of them with a default and one required."""
    if "m.eps" not in metadata:
        raise ArtifactFileError("m.eps is missing")
    scaled = metadata.get("m.scaling") == "linear"
    return metadata.get("m.rope.freq_base", 1e4), metadata["m.eps"], scaled and metadata.get("m.factor", 1.0)


def used(artifact, checkpoint):
    return {row.key: row.used for row in differences(artifact, checkpoint, effect)}


def test_the_same_keys_differ_nowhere() -> None:

    assert (
        used(BASE | {"m.eps": float(np.float32(1e-6)), "general.name": "x", "tokenizer.ggml.model": "gpt2"}, BASE) == {}
    )


def test_a_wrong_value_counts_and_an_unread_one_does_not() -> None:
    assert used(BASE | {"m.rope.freq_base": 1e6, "m.context_length": 4096}, BASE) == {
        "m.context_length": False, "m.rope.freq_base": True,
    }  # fmt: skip


def test_a_missing_key_counts_only_if_its_default_is_another() -> None:
    without = {k: v for k, v in BASE.items() if k != "m.rope.freq_base"}
    assert used(without, BASE) == {"m.rope.freq_base": False}
    assert used(without, BASE | {"m.rope.freq_base": 1e6}) == {"m.rope.freq_base": True}
    assert used({k: v for k, v in BASE.items() if k != "m.eps"}, BASE) == {"m.eps": True}


def test_keys_that_matter_only_together_all_count() -> None:
    assert used(BASE, BASE | {"m.scaling": "linear", "m.factor": 8.0}) == {"m.factor": True, "m.scaling": True}


def test_repair_takes_the_checkpoint_s_value_or_none() -> None:
    assert repaired({"a": 1, "b": 2}, {"a": 3}, "a") == {"a": 3, "b": 2}
    assert repaired({"a": 1, "b": 2}, {"a": 3}, "b") == {"a": 1}


def test_without_effect_everything_counts() -> None:
    (row,) = differences(BASE | {"m.context_length": 1}, BASE)
    assert (row.artifact, row.checkpoint, row.used) == (1, 8192, True)


def test_same() -> None:
    assert same([1.0, 2.0], (1.0, 2.0000001)) and same(1, 1.0) and same("a", "a") and same(float("nan"), float("nan"))
    assert not same(True, 1) and not same([1], [1, 2]) and not same(1e-5, 1.001e-5) and not same(None, 0)
    assert not same("1", 1)
