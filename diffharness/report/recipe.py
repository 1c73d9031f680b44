"""The ladder of `diffharness recipe` as a document: a row for the checkpoint, and one for each recipe."""

from __future__ import annotations

from diffharness.records.grade import Estimate
from diffharness.records.recipe import RecipeRecord, Rung
from diffharness.report._format import NONE, decimals, percent, scientific, size
from diffharness.report.document import Document, Section, Table

_HEAD = ("recipe", "bits", "perplexity", "Δ", "mean KL", "top-1")  # fits 100 columns with its standard errors


def document(record: RecipeRecord) -> Document:
    """The ladder, what its recipes are, and the file that was written."""
    base = record.baseline
    own = ("checkpoint", decimals(base.bits_per_weight, 2), _with_error(base.ppl, 4))
    rows: list[tuple[str, ...]] = [(*own, NONE, NONE, NONE), *map(_row, record.rungs)]
    fixture = record.fixture
    sections = [
        Section(
            pairs=[
                ("checkpoint", record.checkpoint.path),
                ("fixture", f"{fixture.name}: {fixture.n_tokens} tokens, {fixture.n_scored} scored"),
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
        _with_error(found.ppl, 4),
        _with_error(found.difference, 4, sign="+"),
        _kl(found.kl),
        _share(found.top1),
    )


def _with_error(estimate: Estimate, places: int, sign: str = "") -> str:
    error = "" if estimate.error is None else f" ± {estimate.error:.{places}f}"
    return f"{estimate.value:{sign}.{places}f}{error}"


def _kl(estimate: Estimate) -> str:
    return scientific(estimate.value) + ("" if estimate.error is None else f" ± {estimate.error:.0e}")


def _share(estimate: Estimate) -> str:
    return percent(estimate.value) + ("" if estimate.error is None else f" ± {100 * estimate.error:.2f}")


def _about(rung: Rung) -> str:
    schemes = ", ".join(f"{name}: {n}" for name, n in rung.schemes.items())
    return f"{rung.about or rung.name}; {size(rung.n_bytes)} ({schemes})"


def _remarks(record: RecipeRecord) -> list[str]:
    remarks = [
        f"{rung.name}: {len(rung.fell_back)} tensors are stored otherwise, as their rows are not whole blocks: "
        + ", ".join(rung.fell_back[:5])
        + (f" and {len(rung.fell_back) - 5} more" if len(rung.fell_back) > 5 else "")
        for rung in record.rungs
        if rung.fell_back
    ]
    if record.written is not None:
        made = record.written
        remarks.append(
            f"written: {made.path} ({size(made.n_bytes)}, sha256 {made.sha256[:16]}); read back, the reference gives "
            f"perplexity {decimals(made.ppl)}, simulated {decimals(_simulated(record, made.recipe))}"
        )
    return remarks


def _simulated(record: RecipeRecord, name: str) -> float | None:
    return next((rung.statistics.ppl.value for rung in record.rungs if rung.name == name), None)
