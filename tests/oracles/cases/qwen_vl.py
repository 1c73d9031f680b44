"""Text models of Qwen VL in their variants."""

from __future__ import annotations

from typing import Any

from diffharness.weights.names.qwen_vl import qwen3_example
from tests.oracles.cases import Case, Sizes

_HEAD = Sizes(head_dim=128)


def _published_sections() -> dict[str, Any]:
    """Qwen 3 VL's own sections, in heads of its size."""
    text = qwen3_example(_HEAD)["text_config"]
    return {"text_config": text | {"rope_scaling": text["rope_scaling"] | {"mrope_section": [24, 20, 20]}}}


CASES: dict[str, Case] = {
    "qwen2vl-yarn-tied": Case(
        "qwen2vl",
        {
            "tie_word_embeddings": True,
            "rope_scaling": {
                "type": "yarn",
                "mrope_section": [4, 2, 2],
                "factor": 4.0,
                "original_max_position_embeddings": 40,
            },
        },
    ),
    "qwen2vl-epsilon": Case(
        "qwen2vl",
        {"rms_norm_eps": 1e-3},
        engine_differs="the epsilon of norms is not read for this architecture, and is 0",
    ),
    "qwen3vl-published-sections": Case(
        "qwen3vl",
        _published_sections(),
        _HEAD,
        engine_differs="pairs 61 and 62 of 64, in none of the interleaved sections, are not turned by text's positions",
    ),
}
