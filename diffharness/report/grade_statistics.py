"""Statistics of `grade` in words and numbers: with their errors, and every one that llama-perplexity prints."""

from __future__ import annotations

from collections.abc import Callable

from diffharness.records.grade import Estimate, GradeRecord, KlStatistics
from diffharness.report._format import NONE, decimals
from diffharness.report.document import Section, Table

_SIDE_BY_SIDE = 3  # artifacts beside each other


def all_statistics(record: GradeRecord) -> list[Section]:
    """Every statistic of every artifact, some artifacts beside each other."""
    graded = [(row.label, row.statistics) for row in record.rows if row.statistics is not None]
    sections = []
    for at in range(0, len(graded), _SIDE_BY_SIDE):
        part = graded[at : at + _SIDE_BY_SIDE]
        columns = [statistics_rows(stats) for _, stats in part]
        rows = [(name, *(dict(column).get(name, NONE) for column in columns)) for name, _ in columns[0]]
        table = Table("", ("statistic", *(label for label, _ in part)), rows, numeric=True)
        sections.append(Section("" if at else "Every statistic of llama-perplexity --kl-divergence", tables=[table]))
    return sections


def statistics_rows(stats: KlStatistics) -> list[tuple[str, str]]:
    """Names and numbers as llama-perplexity prints them, in its order."""
    rows = [
        ("Mean PPL(Q)", estimate(stats.ppl, 6)),
        ("Mean PPL(base)", estimate(stats.ppl_base, 6)),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", NONE if stats.correlation is None else f"{100 * stats.correlation:.2f} %"),
        ("Mean ln(PPL(Q)/PPL(base))", estimate(stats.ln_ratio, 6)),
        ("Mean PPL(Q)/PPL(base)", estimate(stats.ratio, 6)),
        ("Mean PPL(Q)-PPL(base)", estimate(stats.difference, 6)),
        ("Mean KLD", estimate(stats.kl, 6)),
    ]
    rows += [(f"{_named(name)} KLD", decimals(value, 6)) for name, value in stats.kl_quantiles.items()]
    rows.append(("Mean Δp, %", percents(stats.p_diff)))
    rows += [(f"{_named(name)} Δp, %", f"{100 * value:.3f}") for name, value in stats.p_diff_quantiles.items()]
    return [*rows, ("RMS Δp, %", percents(stats.p_diff_rms)), ("Same top p, %", percents(stats.top1))]


def _named(quantile: str) -> str:
    return {"max": "Maximum", "min": "Minimum", "50%": "Median"}.get(quantile, quantile)


def estimate(found: Estimate | None, places: int) -> str:
    """`2.2660 ± 0.0851`."""
    return NONE if found is None else with_error(found, lambda value: decimals(value, places))


def percents(found: Estimate) -> str:
    """A share and its error in percent, without the sign."""
    return with_error(found, lambda share: f"{100 * share:.3f}")


def with_error(found: Estimate, shown: Callable[[float], str]) -> str:
    """A number and its standard error, if it has one."""
    return shown(found.value) + ("" if found.error is None else f" ± {shown(found.error)}")
