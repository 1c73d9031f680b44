"""Metadata of Llama's relatives that are no model, or one that is not known."""

from __future__ import annotations

from typing import Any

import pytest

from diffharness.errors import ArtifactFileError, DiffharnessError, UnsupportedError
from diffharness.reference.archs import build
from diffharness.reference.archs.deci import Deci
from diffharness.weights.names.smollm3 import ROPE_LAYERS
from diffharness.weights.synth import SynthSource

CASES: list[tuple[str, str, Any, type[DiffharnessError], str]] = [
    ("baichuan", "baichuan.block_count", 30, UnsupportedError, "32 .7B, rope. or 40"),
    ("deci", "deci.attention.head_count", [0, 4, 4, 4], UnsupportedError, "first layer"),
    ("deci", "deci.attention.head_count_kv", [3, 0, 1, 0], ArtifactFileError, "divisor of 4"),
    ("exaone4", "exaone4.rope.freq_base_swa", 77.0, UnsupportedError, "freq_base_swa"),
    ("exaone4", "exaone4.attention.sliding_window_pattern", [True], ArtifactFileError, "one value per layer"),
    ("exaone4", "exaone4.nextn_predict_layers", 4, UnsupportedError, "fewer than the file's 4"),
    ("mistral3", "mistral3.expert_shared_feed_forward_length", 8, UnsupportedError, "shared"),
    ("smollm3", ROPE_LAYERS, [True], ArtifactFileError, "one truth value per layer"),
]


@pytest.mark.parametrize(("arch", "key", "value", "error", "says"), CASES)
def test_what_is_refused(arch: str, key: str, value: Any, error: type[DiffharnessError], says: str) -> None:
    sound = SynthSource(arch).metadata
    build(sound)
    with pytest.raises(error, match=says):
        build({**sound, key: value})


def test_deci_names_layers_by_what_they_have() -> None:
    model = build(SynthSource("deci").metadata)
    assert isinstance(model, Deci)
    assert [model.layer_kind(il) for il in range(4)] == ["global", "no attention", "global", "linear"]
