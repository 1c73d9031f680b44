"""Sizes from which no model can be made are refused by every architecture that reads them, by name and in words."""

from __future__ import annotations

from typing import Any

import pytest

from diffharness.errors import DiffharnessError
from diffharness.reference import archs
from diffharness.weights.names import MAPS
from diffharness.weights.synth import SynthSource

SENSELESS: tuple[tuple[str, Any], ...] = (
    ("attention.key_length", 0),
    ("attention.key_length", -4),
    ("attention.head_count", 0),
    ("block_count", 0),
    ("rope.scaling.factor", -1.0),
)


@pytest.mark.parametrize("arch", MAPS)
def test_senseless_sizes_are_no_crash(arch: str) -> None:
    """Architectures that have no use for a key may pass it over."""
    sound = dict(SynthSource(arch).metadata)
    for key, value in SENSELESS:
        try:
            archs.build(sound | {f"{arch}.{key}": value})
        except DiffharnessError as error:
            assert key.rpartition(".")[2] in str(error), key


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "qwen3moe", "falcon", "granitehybrid"])
@pytest.mark.parametrize(("key", "value"), SENSELESS)
def test_decoders_refuse_them(arch: str, key: str, value: Any) -> None:
    with pytest.raises(DiffharnessError, match=key):
        archs.build(dict(SynthSource(arch).metadata) | {f"{arch}.{key}": value})


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_width_of_less_than_the_heads_is_refused_where_no_key_states_their_size(arch: str) -> None:
    metadata = dict(SynthSource(arch).metadata) | {f"{arch}.embedding_length": 1}
    metadata.pop(f"{arch}.attention.key_length", None)
    with pytest.raises(DiffharnessError, match="key_length"):
        archs.build(metadata)
