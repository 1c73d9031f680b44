"""Several engines by their logits alone: rounding that grows in the model is told from another graph."""

from __future__ import annotations

import numpy as np
import pytest

from diffharness.legs.engines import EngineLogits, judge
from diffharness.records import EngineRow

N = 64
TRUE = np.random.default_rng(0).standard_normal((N, 50)).astype(np.float32)
FLOORS = {
    "engines.strict": 1e-6, "compare.nmse": 1e-6, "graph.logits": 1e-4, "settings.factor": 6.0,
    "settings.token_factor": 20.0, "settings.rounding": 1e-5, "settings.rounding_token": 1e-4,
}  # fmt: skip


def off(size: float, seed: int, tokens: slice = slice(None)) -> np.ndarray:
    """Logits at NMSE `size`, at some tokens."""
    found, noise = TRUE.copy(), np.random.default_rng(seed).standard_normal(TRUE.shape)
    found[tokens] += (np.sqrt(size) * noise)[tokens].astype(np.float32)
    return found


def said(first: np.ndarray, other: np.ndarray, *, routed: bool = False, native: np.ndarray = TRUE) -> list[str | None]:
    row, of_first = EngineRow(name="other", status="same"), EngineRow(name="first", status="first")
    of_first.strict = float(((first - TRUE) ** 2).sum() / (TRUE**2).sum())
    judged = judge(
        row, of_first, EngineLogits(native, other), EngineLogits(TRUE, first), TRUE, np.arange(N), FLOORS,
        first_passes=True, model="m.gguf", routed=routed,
    )  # fmt: skip
    return [finding.kind for finding in judged.findings]


@pytest.mark.parametrize(
    ("first", "other", "kinds"),
    [(1e-12, 1e-12, []), (1e-12, 1e-2, ["engine.graph"]), (1e-3, 2e-3, []), (1e-3, 1e-1, ["engine.graph"]),
     (1e-9, 2e-5, ["inconclusive"])],
)  # fmt: skip
def test_an_engine_is_convicted_where_it_is_further_off_than_the_first(
    first: float, other: float, kinds: list[str | None]
) -> None:
    assert said(off(first, 1), off(other, 2)) == kinds


def test_few_tokens_of_a_mixture_of_experts_convict_nobody() -> None:
    few = off(0.1, 2, slice(5, 8))
    assert said(off(1e-12, 1), few, routed=True) == ["inconclusive"]
    assert said(off(1e-12, 1), few) == ["engine.graph"]
    assert said(off(1e-12, 1), off(0.1, 2), routed=True) == ["engine.graph"]


@pytest.mark.parametrize(("size", "routed", "kinds"), [(3, True, [None]), (3, False, ["inconclusive"]),
                                                       (60, True, ["inconclusive"])])  # fmt: skip
def test_native_runs_may_part_at_few_tokens_where_experts_nearly_tie(
    size: int, routed: bool, kinds: list[str | None]
) -> None:
    native = off(0.5, 3, slice(0, size))
    assert said(off(1e-12, 1), off(1e-12, 2), routed=routed, native=native) == kinds
