"""The kernel leg. Until graph nodes are replayed, it reports native against strict as numbers and judges nothing.

Native and strict differ by everything that the native run does to be fast: quantized activations,
F16 KV, repacked weights, flash attention. That loss is normal, so the numbers alone convict no one.
"""

from __future__ import annotations

from diffharness.legs.compare import logit_stats
from diffharness.metrics import LogitComparison
from diffharness.records import KernelLeg

NOT_BUILT = "numbers only: this version does not replay single nodes, so nothing is judged"


def numbers(logits: LogitComparison | None, *, reason: str | None = None) -> KernelLeg:
    """Native engine (other) against strict engine (ref) at the scored positions; `reason` if that is missing too."""
    if logits is None:
        return KernelLeg(status="not_run", reason=reason or "there is no native run to compare")
    return KernelLeg(status="not_run", reason=NOT_BUILT, logits=logit_stats(logits))
