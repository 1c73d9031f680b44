"""MiniMax M2."""

from __future__ import annotations

from tests.oracles.cases import Case, Sizes

CASES = {
    "minimax-m2-whole-wide": Case(
        "minimax-m2",
        {"rotary_dim": 64},
        Sizes(n_embd=256, n_ff_expert=256, head_dim=64, n_vocab=320, n_head_kv=1),
    ),
}
