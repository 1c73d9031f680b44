"""Gemma 3n."""

from __future__ import annotations

from tests.oracles.cases import Case

_DEVIATION = "the standard deviation of gates divides by one less than their number (sparse layers)"


CASES = {
    "gemma3n": Case("gemma3n", engine_differs=_DEVIATION),
    "gemma3n-other-numbers": Case(
        "gemma3n",
        {
            "activation_sparsity_pattern": [0.0, 0.9] * 12 + [0.5],
            "num_kv_shared_layers": 10,
            "final_logit_softcapping": 2.0,
            "altup_active_idx": 1,
            "tie_word_embeddings": False,
        },
        engine_differs="these numbers are constants of its graph",
    ),
}
