"""Keys that no builder asks for are refused where they would change the model, and left alone where they would not."""

from __future__ import annotations

from typing import Any

import pytest

from diffharness.errors import UnsupportedError
from diffharness.reference.archs import TWINS, build
from diffharness.weights.synth import SynthSource

SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping")
WITH_NEXTN = (
    "bailingmoe2",
    "cohere2moe",
    "deepseek2",
    "exaone-moe",
    "exaone4",
    "glm4",
    "glm4moe",
    "nemotron_h",
    "qwen35",
    "qwen3next",
)


@pytest.mark.parametrize("key", SOFTCAPS)
def test_a_cap_that_the_model_does_not_have_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        build({**SynthSource("llama").metadata, f"llama.{key}": 20.0})


def test_what_llama_cpp_writes_into_every_file_of_its_own_is_left_alone() -> None:
    values = dict(zip(SOFTCAPS, (50.0, 30.0, 30.0), strict=True)) | {"attention.value_scale": 0.0}
    sound = SynthSource("llama").metadata
    assert build({**sound, **{f"llama.{key}": value for key, value in values.items()}}) == build(sound)


@pytest.mark.parametrize(("key", "twin"), TWINS.items())
def test_sizes_of_sliding_layers_alone_are_refused(key: str, twin: str) -> None:
    sound = dict(SynthSource("olmo2").metadata)
    size = sound.setdefault(f"olmo2.{twin}", 16)
    assert build({**sound, f"olmo2.{key}": size}) == build(sound)
    with pytest.raises(UnsupportedError, match=key):
        build({**sound, f"olmo2.{key}": size // 2})


@pytest.mark.parametrize("key", ["rope.dimension_count", "attention.value_length", "attention.value_length_swa"])
def test_gemma4_heads_have_one_size(key: str) -> None:
    sound = SynthSource("gemma4").metadata
    with pytest.raises(UnsupportedError, match=key):
        build({**sound, f"gemma4.{key}": sound[f"gemma4.{key}"] // 2})


@pytest.mark.parametrize("arch", WITH_NEXTN)
def test_layers_that_predict_further_tokens_leave_some(arch: str) -> None:
    sound: dict[str, Any] = dict(SynthSource(arch).metadata)
    n_block = sound[f"{arch}.block_count"]
    assert build({**sound, f"{arch}.nextn_predict_layers": 1}).n_layer == n_block - 1
    for n_nextn in (n_block, n_block + 1):
        with pytest.raises(UnsupportedError, match="nextn_predict_layers"):
            build({**sound, f"{arch}.nextn_predict_layers": n_nextn})
