"""`grade` with the reference's products in bfloat16: what that costs in exactness, measured, and what it hides.

The forward of the run's first tokens is made in float32 as well, on the weights of the base, or of the first artifact
where there is none. Both sides of a comparison are rounded, so that what is less than twice that noise tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffharness import kld
from diffharness.captures import Capture
from diffharness.errors import SettingsError
from diffharness.fixture import Fixture
from diffharness.machine import this_machine
from diffharness.metrics import nmse
from diffharness.pipeline.logit_series import LOGITS
from diffharness.pipeline.reference_runs import Forward, Precision
from diffharness.records.grade import Bf16Noise, GradeRow, Paired
from diffharness.reference.bf16 import Bf16Forward
from diffharness.weights.source import IntArray, WeightSource

TOKENS = 64  # whose forward is made both ways
_SIDES = 2  # of a comparison, both of them rounded
_FAST = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class Bf16Precision(Precision):
    """Products in bfloat16, all else in float32. Whatever makes a `Reference` of its own has float32 from this."""

    def forward(self, source: WeightSource) -> Forward:
        return Bf16Forward(source, device=self.device)


def check(dtype: str, with_control: bool) -> None:
    """SettingsError for what asks for more exactness than there is."""
    if dtype != "float32":
        raise SettingsError("expected one of --matmul bf16 and --dtype float64, found both")
    if with_control:
        raise SettingsError(
            "expected products in full precision to judge by a control, found --matmul bf16",
            hint="leave --matmul bf16 or --control out",
        )


def measured(source: WeightSource, fixture: Fixture, precision: Bf16Precision, kept: Capture | None) -> Bf16Noise:
    """Of the fixture's first tokens; `kept` has the logits that the run itself made of `source`, if it kept them."""
    n = min(TOKENS, fixture.n_tokens - 1)
    chunks = first_rows(fixture.chunks(), n)
    exact = Precision(device=precision.device).forward(source).run(chunks)
    assert exact is not None, "run keeps logits unless told otherwise"
    if kept is not None:
        coarse = np.asarray(kept.read(LOGITS)[:n])
    else:
        out = precision.forward(source).run(chunks)
        assert out is not None, "as above"
        coarse = out.cpu().numpy()
    plain = exact.cpu().numpy()
    statistics = kld.statistics(kld.series(plain, coarse, np.array(fixture.ids[1 : n + 1], dtype=np.int64)))
    return Bf16Noise(
        label=source.label,
        nmse=nmse(coarse, plain),
        statistics=statistics,
        limit=_SIDES * statistics.kl.value,
        supported=_supported(precision.device),
    )


def first_rows(chunks: Sequence[IntArray], n: int) -> list[IntArray]:
    """The chunks as far as they hold the first n rows, the last of them cut there."""
    starts = np.cumsum([0, *map(len, chunks)])
    return [chunk[: n - start] for chunk, start in zip(chunks, starts[:-1], strict=True) if start < n]


def mark(row: GradeRow, noise: Bf16Noise) -> None:
    """Say of a row's mean KLs whether they are within the noise."""
    row.within_noise = None if row.statistics is None else row.statistics.kl.value <= noise.limit
    if row.engine is not None and row.engine.kl is not None:
        row.engine.within_noise = row.engine.kl.value <= noise.limit


def marked(pair: Paired, noise: Bf16Noise) -> Paired:
    """A difference within the noise tells nothing apart."""
    if not abs(pair.mean) <= noise.limit:
        return pair
    return pair.model_copy(update={"within_noise": True, "told_apart": False})


def _supported(device: str) -> bool | None:
    """Whether the processor multiplies in bfloat16 by itself; None where that is not known."""
    flags = frozenset(this_machine().flags)
    return bool(flags & _FAST) if device == "cpu" and "avx2" in flags else None
