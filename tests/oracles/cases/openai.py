"""gpt-oss."""

from __future__ import annotations

from tests.oracles.cases import Case, Sizes

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300, "rope_theta": 5e3}
_EVERY_THIRD = ["full_attention" if il % 3 == 0 else "sliding_attention" for il in range(4)]

CASES = {
    "gpt-oss-untruncated": Case(
        "gpt-oss",
        {"rope_parameters": _YARN | {"truncate": False}},
        engine_differs="YaRN's range is rounded to whole dimensions, which `truncate: false` of every model forbids",
    ),
    "gpt-oss-betas": Case(
        "gpt-oss",
        {"rope_parameters": _YARN | {"beta_fast": 2.0, "beta_slow": 0.5, "truncate": True}},
        engine_differs="the keys yarn_beta_fast and yarn_beta_slow are read for other architectures only",
    ),
    "gpt-oss-no-yarn": Case("gpt-oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}),
    "gpt-oss-layer-types": Case("gpt-oss", {"layer_types": _EVERY_THIRD}),
    "gpt-oss-tied-wide": Case(
        "gpt-oss", sizes=Sizes(n_embd=256, n_ff=512, n_ff_expert=256, head_dim=64, n_vocab=320, n_head_kv=1)
    ),
}
