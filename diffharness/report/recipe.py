"""The ladder of `diffharness recipe` as a document: a row for the checkpoint, and one for each recipe."""

from __future__ import annotations

from diffharness.records.grade import Estimate
from diffharness.records.recipe import RecipeRecord, Rung
from diffharness.report import _content
from diffharness.report._format import NONE, decimals, percent, scientific, size
from diffharness.report.document import Document, Section, Table
from diffharness.report.grade_statistics import estimate
from diffharness.words import counted, listed

_HEAD = ("recipe", "bits", "perplexity", "Δ", "mean KL", "top-1")  # fits 100 columns with its standard errors


def document(record: RecipeRecord) -> Document:
    """The ladder, what its recipes are, and the file that was written."""
    base = record.baseline
    own = ("checkpoint", decimals(base.bits_per_weight, 2), estimate(base.ppl, 4))
    rows: list[tuple[str, ...]] = [(*own, NONE, NONE, NONE), *map(_row, record.rungs)]
    sections = [
        Section(
            pairs=[
                ("checkpoint", record.checkpoint.path),
                ("fixture", _content.tokens(record.fixture)),
            ],
            tables=[Table("", _HEAD, rows, numeric=True)],
            remarks=["bits per weight of all tensors together; Δ and KL from the checkpoint; ± one standard error"],
        ),
        Section("Recipes", pairs=[(rung.name, _about(rung)) for rung in record.rungs], remarks=_remarks(record)),
    ]
    return Document("recipe", "", _summary(record), sections, [("Reproduce", record.repro)] if record.repro else [])


def _summary(record: RecipeRecord) -> str:
    n = len(record.rungs)
    ladder = f" (ladder {record.ladder})" if record.ladder else ""
    return f"{n} recipe{'s' * (n != 1)}{ladder}, simulated in the reference against {record.checkpoint.path}"


def _row(rung: Rung) -> tuple[str, ...]:
    found = rung.statistics
    return (
        rung.name,
        decimals(rung.bits_per_weight, 2),
        estimate(found.ppl, 4),
        _difference(found.difference),
        _kl(found.kl),
        _share(found.top1),
    )


def _difference(found: Estimate) -> str:
    return f"{found.value:+.4f}" + ("" if found.error is None else f" ± {found.error:.4f}")


def _kl(found: Estimate) -> str:
    return scientific(found.value) + ("" if found.error is None else f" ± {found.error:.0e}")


def _share(found: Estimate) -> str:
    return percent(found.value) + ("" if found.error is None else f" ± {100 * found.error:.2f}")


def _about(rung: Rung) -> str:
    schemes = ", ".join(f"{name}: {n}" for name, n in rung.schemes.items())
    return f"{rung.about or rung.name}; {size(rung.n_bytes)} ({schemes})"


def _remarks(record: RecipeRecord) -> list[str]:
    remarks = [
        f"{rung.name}: {counted(len(rung.fell_back), 'tensor is', 'tensors are')} stored otherwise, rows being no "
        "whole blocks: " + listed(rung.fell_back, 5)
        for rung in record.rungs
        if rung.fell_back
    ]
    remarks += [f"left out: {why}" for why in record.left_out.values()]
    if record.written is not None:
        made = record.written
        remarks.append(
            f"written: {made.path} ({size(made.n_bytes)}, sha256 {made.sha256[:16]}); read back, the reference gives "
            f"perplexity {decimals(made.ppl)}, simulated {decimals(_simulated(record, made.recipe))}"
        )
    return remarks


def _simulated(record: RecipeRecord, name: str) -> float | None:
    return next((rung.statistics.ppl.value for rung in record.rungs if rung.name == name), None)
