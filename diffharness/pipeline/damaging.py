"""A damaged copy, with ggml's own quantizer: the wiring of `diffharness damage`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffharness import damage
from diffharness.damage import FAULTS, Fault, Options
from diffharness.engine.quantizer import Quantizer
from diffharness.records.damage import ChangeRow, DamageRecord, FaultRow
from diffharness.settings import EngineSettings
from diffharness.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class DamageRequest:
    """One damaged copy. `engine` is the build whose quantizer is used."""

    source: Path
    out: Path
    how: Sequence[str]
    engine: EngineSettings
    seed: int = 0
    options: Options = field(default_factory=Options)
    checkpoint: Path | None = None
    set_keys: Sequence[str] = ()
    drop_keys: Sequence[str] = ()
    repro: str = ""


def run(request: DamageRequest) -> DamageRecord:
    """Write the copy and say what was done. Raises as `damage.apply` does, and EngineError where the quantizer dies."""
    with Quantizer(request.engine) as quantizer, contextlib.ExitStack() as stack:
        checkpoint = None
        if request.checkpoint is not None:
            checkpoint = Checkpoint(request.checkpoint)
            stack.callback(checkpoint.close)
        done = damage.apply(
            request.source,
            request.out,
            request.how,
            seed=request.seed,
            options=request.options,
            quantize=quantizer.quantize,
            checkpoint=checkpoint,
            set_keys=request.set_keys,
            drop_keys=request.drop_keys,
        )
    return DamageRecord(
        source=str(request.source),
        out=str(request.out),
        checkpoint=None if request.checkpoint is None else str(request.checkpoint),
        how=done.faults,
        seed=done.seed,
        n_tensors=done.n_tensors,
        n_bytes=done.n_bytes,
        truncated_from=done.truncated_from,
        changes=[ChangeRow(name=c.name, type=c.type, what=c.what, changed=c.changed) for c in done.changes],
        repro=request.repro,
    )


def listed() -> DamageRecord:
    """Every fault there is."""
    return DamageRecord(faults=[_row(fault) for fault in FAULTS.values()])


def _row(fault: Fault) -> FaultRow:
    return FaultRow(
        name=fault.name,
        what=fault.what,
        shows=fault.shows,
        tensors=fault.tensors,
        strength=fault.strength if fault.takes_strength else None,
        means=fault.means,
    )
