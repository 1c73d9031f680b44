"""The tables of `diffharness grade`: perplexity, KL, both by position, which artifacts can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from diffharness.records.grade import GradeRecord, GradeRow, Paired, PairRow, PositionBucket
from diffharness.report import attention
from diffharness.report._format import NONE, decimals, scientific, size
from diffharness.report.document import Document, Section, Table
from diffharness.report.grade_statistics import all_statistics, estimate, percents, with_error

_ALL_PAIRS = 10  # pairs shown; of more, only neighbours in the order of perplexity

_SHOWN = {"50%": "median", "99%": "99 %", "99.9%": "99.9 %", "max": "max"}

LLAMA = "llama.cpp"


def document(record: GradeRecord, *, full: bool = False) -> Document:
    """The record as a document; `full` adds every statistic that llama-perplexity prints."""
    sections = [
        Section(pairs=_about(record), tables=[_perplexity(record)]),
        *_kl(record),
        *_noise(record),
        *_control(record),
        *_curves(record),
        *_pairs(record),
        *(
            s
            for row in record.rows
            if row.attention
            for s in attention.sections(row.attention, title=f"Attention of {row.label}", full=full)
        ),
        *(all_statistics(record) if full else []),
    ]
    remarks = _remarks(record)
    if remarks:
        sections.append(Section("Remarks", remarks=remarks))
    judged = [row for row in record.rows if row.control is not None]
    beyond = [row.label for row in judged if row.control is not None and row.control.beyond]
    commands = [("Reproduce", record.repro)] if record.repro else []
    return Document(
        command="grade",
        outcome=("fail" if beyond else "pass") if judged else "",
        summary=_summary(record, len(judged), beyond),
        sections=sections,
        commands=commands,
    )


def _summary(record: GradeRecord, n_judged: int, beyond: Sequence[str]) -> str:
    failed = sum(row.error is not None for row in record.rows)
    n = len(record.rows) - failed
    parts = [f"{n} artifact{'' if n == 1 else 's'} graded" + (f", {failed} not" if failed else "")]
    if beyond:
        parts.append(f"more is lost than the types explain in {', '.join(beyond)}")
    elif n_judged:
        parts.append("none lost more than its types explain")
    return "; ".join(parts) + "."


def _about(record: GradeRecord) -> list[tuple[str, str]]:
    fixture = record.fixture
    about: list[tuple[str, str]] = []
    if record.base is not None:
        about.append((record.base.kind if record.base.kind == "checkpoint" else "against", record.base.label))
    scored = f"{fixture.name}: {fixture.n_tokens} tokens in chunks of {fixture.chunk}, {fixture.n_scored} scored"
    about.append(("fixture", scored))
    if record.engine is not None:
        parts = [f"llama.cpp {record.engine.version or 'of unknown version'}", *record.engine.overrides]
        about.append(("engine", " · ".join(parts)))
    return about


def _perplexity(record: GradeRecord) -> Table:
    with_engine = any(row.engine is not None for row in record.rows)
    head = ["artifact", "size", "bpw", "PPL"]
    head += ([LLAMA] if with_engine else []) + (["ln(PPL/base)"] if record.base else [])
    rows: list[tuple[str, ...]] = []
    if record.base is not None:
        rest = [NONE] * (len(head) - 4)
        rows.append((record.base.label, NONE, NONE, estimate(record.base.ppl, 4), *rest))
    for row in record.rows:
        cells = [row.label, size(row.artifact.n_bytes), decimals(row.bpw, 2), estimate(row.ppl, 4)]
        if with_engine:
            cells.append(_engine_cell(row))
        if record.base is not None:
            cells.append(estimate(None if row.statistics is None else row.statistics.ln_ratio, 4))
        rows.append(tuple(cells))
    return Table("Perplexity, ± standard error", tuple(head), rows, numeric=True)


def _engine_cell(row: GradeRow) -> str:
    if row.engine is None:
        return NONE
    # Its standard error is the reference's, give or take: the positions are the same.
    return "no result" if row.engine.ppl is None else decimals(row.engine.ppl.value)


def _kl(record: GradeRecord) -> list[Section]:
    graded = [(row, row.statistics) for row in record.rows if row.statistics is not None]
    if not graded or record.base is None:
        return []
    with_engine = any(row.engine is not None and row.engine.kl is not None for row in record.rows)
    divergence, agreement = [], []
    for row, stats in graded:
        quantiles = [scientific(stats.kl_quantiles[name]) for name in _SHOWN]
        engine = [scientific(row.engine.kl.value if row.engine and row.engine.kl else None)] if with_engine else []
        divergence.append((row.label, with_error(stats.kl, scientific), *engine, *quantiles))
        correlation = NONE if stats.correlation is None else f"{100 * stats.correlation:.2f}"
        shares = [percents(found) for found in (stats.p_diff, stats.p_diff_rms)]
        agreement.append((row.label, percents(stats.top1), *shares, correlation))
    head = ("artifact", "mean", *([LLAMA] if with_engine else []), *_SHOWN.values())
    tables = [
        Table(f"KL from {record.base.label}, in nats", head, divergence, numeric=True),
        Table("Agreement, in %", ("artifact", "same top", "mean Δp", "RMS Δp", "correlation"), agreement, numeric=True),
    ]
    return [Section(tables=tables)]


def _noise(record: GradeRecord) -> list[Section]:
    """What products in bfloat16 cost, and what is too small to be seen through that."""
    noise = record.bf16
    if noise is None:
        return []
    stats = noise.statistics
    cells = [scientific(noise.nmse), with_error(stats.kl, scientific)]
    cells += [scientific(stats.kl_quantiles[name]) for name in _SHOWN] + [percents(stats.top1)]
    head = (f"first {stats.n} tokens", "NMSE", "mean KL", *_SHOWN.values(), "same top, %")
    title = "Noise of --matmul bf16, against float32 on the same tokens and weights"
    told = [(row.label, row.within_noise) for row in record.rows]
    told += [(f"{row.label} in {LLAMA}", row.engine.within_noise) for row in record.rows if row.engine is not None]
    hidden = [label for label, within in told if within]
    remarks = [
        f"A mean KL, or a difference of mean KL or NLL, up to {scientific(noise.limit)} nats (twice the noise, as both "
        "sides are rounded) ranks nothing; without --matmul bf16 it would"
    ]
    if hidden:
        remarks.append(f"Within the noise: mean KL of {', '.join(hidden)}")
    if noise.supported is False:
        remarks.append("This CPU has neither AVX512-BF16 nor AMX: without --matmul bf16 it is faster as well")
    return [Section(tables=[Table(title, head, [(noise.label, *cells)], numeric=True)], remarks=remarks)]


def _control(record: GradeRecord) -> list[Section]:
    judged = [(row, row.control, row.statistics) for row in record.rows if row.control and row.statistics]
    if not judged:
        return []
    head = ("artifact", "", "mean KL", "control", "ratio", "limit", "median", "limit", "PPL of control")
    rows = [
        (
            row.label,
            "fail" if control.beyond else "ok",
            scientific(own.kl.value),
            scientific(control.statistics.kl.value),
            decimals(control.kl_ratio, 2),
            scientific(control.kl_limit),
            scientific(own.kl_quantiles["50%"]),
            scientific(control.median_limit),
            decimals(control.statistics.ppl.value),
        )
        for row, control, own in judged
    ]
    title = "Against a control: the checkpoint quantized afresh to the same types"
    return [Section(tables=[Table(title, head, rows, numeric=True)], words=2)]


# -- by position --------------------------------------------------------------------------------------


def _curves(record: GradeRecord) -> list[Section]:
    """KL of artifact, llama.cpp and control; NLL without the controls, which say nothing new there."""
    kl: list[tuple[str, Sequence[PositionBucket]]] = []
    nll: list[tuple[str, Sequence[PositionBucket]]] = []
    for row in record.rows:
        own = [(row.label, row.positions)]
        if row.engine is not None:
            own.append((f"{row.label}, {LLAMA}", row.engine.positions))
        nll += [(label, curve) for label, curve in own if curve]
        if row.control is not None:
            own.append((f"{row.label}, control", row.control.positions))
        kl += [(label, curve) for label, curve in own if curve]
    if not nll:
        return []
    spans = [(bucket.start, bucket.stop) for bucket in nll[0][1]]
    tables = []
    if record.base is not None:
        tables.append(_curve("Mean KL by position in the chunk", spans, kl, lambda b: scientific(b.kl)))
        nll = [(record.base.label, record.base.positions), *nll]
    tables.append(_curve("Mean NLL by position in the chunk, in nats", spans, nll, lambda b: decimals(b.nll)))
    reached = [f"{name} is {at}" for name, at in record.landmarks.items()]
    beyond = [f"{name} is {at}, and no chunk is longer" for name, at in record.unreached.items()]
    return [Section(tables=tables, remarks=reached + beyond)]


def _curve(
    title: str,
    spans: Sequence[tuple[int, int]],
    curves: Sequence[tuple[str, Sequence[PositionBucket]]],
    cell: Callable[[PositionBucket], str],
) -> Table:
    head = ("artifact", *(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in spans))
    rows = []
    for label, curve in curves:
        by_span = {(bucket.start, bucket.stop): cell(bucket) for bucket in curve}
        rows.append((label, *(by_span.get(span, NONE) for span in spans)))
    return Table(title, head, rows, numeric=True)


# -- pairs --------------------------------------------------------------------------------------------


def _pairs(record: GradeRecord) -> list[Section]:
    """Who predicts the text better, and who is closer to the base: two questions."""
    shown = _shown_pairs(record)
    if not shown:
        return []
    of_all = "" if len(shown) == len(record.pairs) else f" ({len(shown)} of {len(record.pairs)} pairs)"
    title = f"NLL at the same positions, ± standard error from blocks of positions{of_all}"
    tables = [_pair_table(title, "better", [(pair, pair.nll) for pair in shown])]
    by_kl = [(pair, pair.kl) for pair in shown if pair.kl is not None]
    if by_kl:
        tables.append(_pair_table(f"KL at the same positions{of_all}", "closer", by_kl))
    return [Section(tables=tables, words=2)]


def _pair_table(title: str, word: str, pairs: Sequence[tuple[PairRow, Paired]]) -> Table:
    rows = []
    for pair, found in pairs:
        first, second = (pair.b, pair.a) if found.mean > 0 else (pair.a, pair.b)
        by = decimals(abs(found.mean), 5) + ("" if found.error is None else f" ± {found.error:.5f}")
        z = NONE if found.z is None else f"{abs(found.z):.1f}"
        told = "yes" if found.told_apart else "too few positions" if found.error is None else "no"
        if found.within_noise:
            told = "within noise"
        rows.append((first, second, by, z, told))
    return Table(title, (word, "than", "by, nats", "z", "told apart"), rows, numeric=True)


def _shown_pairs(record: GradeRecord) -> list[PairRow]:
    if len(record.pairs) <= _ALL_PAIRS:
        return record.pairs
    graded = [(row.ppl.value, row.label) for row in record.rows if row.ppl is not None]
    ranked = [label for _, label in sorted(graded)]
    neighbours = {frozenset(two) for two in pairwise(ranked)}
    return [pair for pair in record.pairs if frozenset((pair.a, pair.b)) in neighbours]


# -- remarks ------------------------------------------------------------------------------


def _remarks(record: GradeRecord) -> list[str]:
    remarks = [finding.message for finding in record.findings]
    for row in record.rows:
        told = [
            ("not graded", row.error),
            ("llama.cpp gave no result", row.engine.error if row.engine is not None else None),
            ("no control", row.control_error),
            *(("note", note) for note in row.notes),
        ]
        remarks += [f"{row.label}: {what}: {why}" for what, why in told if why]
    return remarks
