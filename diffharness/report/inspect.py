"""What an inspection prints: verdict, patterns, the worst tensors beside their controls, classes, layers, metadata."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from diffharness.layers import ranges
from diffharness.records.inspect import Bins, Grid, InspectRecord, Measures, PatternRow, TensorMeasures
from diffharness.report import _content
from diffharness.report._format import NONE, clean, cosine, decimals, scientific
from diffharness.report.document import Document, Section, Table
from diffharness.words import counted, listed

_WORST = 12  # tensors shown where some drifted
_FURTHEST = 5  # and where none did
_OF_A_CLASS = 3
_FINDINGS = 8
_PATTERNS = 10
_LONGEST = 280  # characters of a pattern
_NAMES = 12  # of tensors that are only listed
_CELL = 40  # characters of a metadata value
_WITHIN = "."


def document(record: InspectRecord) -> Document:
    """The report, for a terminal of 100 columns and for Markdown."""
    sections = [Section(pairs=_subject(record))]
    if record.patterns:
        sections.append(Section("Patterns", remarks=_patterns(record.patterns)))
    sections += _tensors(record)
    if record.classes:
        sections.append(Section("By class, pooled over its values", tables=[_classes(record)], words=2))
    if record.totals.drifted and record.grid.layers:
        sections.append(_grid(record.grid, record.layer_kinds))
    if record.metadata:
        sections.append(Section("Metadata", tables=[_metadata(record)], words=4))
    told = {record.verdict.summary.rstrip(".")}
    findings = [
        f"{f.kind or 'note'}: {f.message}" for f in record.findings if not any(f.message in text for text in told)
    ]
    if findings:
        sections.append(Section("Findings", remarks=findings[:_FINDINGS]))
    commands = [("Next", record.verdict.next_step), ("Reproduce", record.repro)]
    return Document(
        command="inspect",
        outcome=record.verdict.primary,
        summary=record.verdict.summary,
        sections=sections,
        commands=[(label, command) for label, command in commands if command],
    )


def _patterns(rows: Sequence[PatternRow]) -> list[str]:
    shown = [clean(f"{row.kind}: {row.message}", _LONGEST) for row in rows[:_PATTERNS]]
    rest = len(rows) - _PATTERNS
    return shown + ([f"and {rest} more, in the record"] if rest > 0 else [])


# -- what was compared --------------------------------------------------------------------------------


def _subject(record: InspectRecord) -> list[tuple[str, str]]:
    about, totals = record.subject, record.totals
    drift = f"{totals.drifted} of {totals.tensors} tensors drifted, {totals.drifted_attention} of them in attention"
    rows = [("artifact", _content.artifact(about.artifact)), ("drift", drift)]
    if about.checkpoint is not None:
        rows.insert(1, ("checkpoint", _content.checkpoint(about.checkpoint)))
    if record.control is not None:
        rows.insert(2, ("control", record.control))
    for label, names in (("missing", record.missing), ("extra", record.extra), ("ignored", record.ignored)):
        if names:
            rows.append((label, f"{counted(len(names), 'tensor')}: {listed(names, _NAMES)}"))
    return rows


# -- tensors ------------------------------------------------------------------------------------------


def _tensors(record: InspectRecord) -> list[Section]:
    compared = [t for t in record.tensors if t.artifact is not None or t.drifted]
    shown = worst(compared)
    if not shown:
        return []
    title = f"The worst tensors, at most {_OF_A_CLASS} of a class"
    if not record.totals.drifted:
        title = "The tensors furthest from the checkpoint, none of them further than its type explains"
    errors = Table(
        "",
        ("tensor", "type", "beyond the control in", "error", "control", "ratio", "cos", "row 1%"),
        [_errors(t) for t in shown],
    )
    measured = [t for t in shown if t.artifact is not None]
    spread = Table(
        _kl_title(record.bins),
        ("tensor", "bpw", "SQNR", "control", "scale", "KL", "control", "outliers", "channels"),
        [_spread(t, t.artifact) for t in measured if t.artifact is not None],
    )
    return [Section(title, tables=[errors], words=3), Section("", tables=[spread])]


def worst(tensors: Sequence[TensorMeasures]) -> list[TensorMeasures]:
    """Drifted tensors, the furthest beyond their control first and few of a class; where none drifted, the furthest."""
    ranked = sorted(tensors, key=_badness, reverse=True)
    hit = [t for t in ranked if t.drifted]
    if not hit:
        return ranked[:_FURTHEST]
    seen: Counter[str] = Counter()
    shown = []
    for t in hit:
        seen[t.klass] += 1
        if seen[t.klass] <= _OF_A_CLASS:
            shown.append(t)
    return shown[:_WORST]


def _badness(t: TensorMeasures) -> tuple[float, float]:
    """By how much a tensor is beyond its control, between equals the larger error."""
    if t.nan or t.inf or t.artifact is None:
        return (math.inf if t.drifted else -1.0), 0.0
    return (-1.0 if t.ratio is None else round(t.ratio, 2)), t.artifact.error


def _errors(t: TensorMeasures) -> tuple[str, ...]:
    a, c = t.artifact, t.control
    return (
        _short(t.name),
        t.type,
        t.why or "",
        scientific(a.error if a else None),
        scientific(c.error if c else None),
        _ratio(t.ratio),
        cosine(a.cos if a else None),
        cosine(a.cos_row_p1 if a else None),
    )


def _spread(t: TensorMeasures, a: Measures) -> tuple[str, ...]:
    c = t.control
    return (
        _short(t.name),
        f"{t.bpw:.2f}",
        decimals(a.sqnr, 1),
        decimals(c.sqnr if c else None, 1),
        decimals(a.scale, 3),
        scientific(a.kl_drift),
        scientific(c.kl_drift if c else None),
        _kept(a.outlier_kept, c.outlier_kept if c else None),
        _kept(a.channel_kept, c.channel_kept if c else None),
    )


def _kl_title(bins: Bins | None) -> str:
    text = "SQNR in dB; outliers and channel maxima: share kept, the control's behind the stroke"
    if bins is None:
        return text
    return f"{text}; KL drift in nats, over {bins.n} bins: mean +- {bins.span:g} standard deviations, two of them open"


def _short(name: str) -> str:
    return clean(name.removesuffix(".weight"), 60)


def _ratio(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.1f}" if value < 100 else f"{value:.0f}" if value < 10000 else f"{value:.0e}".replace("e+0", "e")


def _kept(ours: float | None, control: float | None) -> str:
    return f"{decimals(ours, 2)}/{decimals(control, 2)}"


# -- summaries ----------------------------------------------------------------------------------------


def _classes(record: InspectRecord) -> Table:
    head = ("class", "furthest", "tensors", "drifted", "bpw", "error", "control", "least cos")
    rows = [
        (
            row.group,
            _short(row.worst or NONE),
            str(row.n),
            str(row.drifted),
            f"{row.bpw:.2f}",
            scientific(row.error),
            scientific(row.control),
            cosine(row.cos_min),
        )
        for row in record.classes
    ]
    return Table("", head, rows)


def _grid(grid: Grid, kinds: Sequence[str]) -> Section:
    """Layers as rows; neighbours with nothing beyond the control share one."""
    several = len(set(kinds)) > 1
    lines: list[tuple[list[int], str, tuple[str, ...]]] = []
    for layer, ratios, drifted in zip(grid.layers, grid.ratios, grid.drifted, strict=True):
        kind = kinds[layer] if several and layer < len(kinds) else ""
        cells = (_cell(ratio, hit) for ratio, hit in zip(ratios, drifted, strict=True))
        lines.append(([layer], kind, tuple(cells)))
    rows = []
    for (sound, *_), group in groupby(lines, key=lambda line: (not any(_is_hit(c) for c in line[2]), line[2])):
        members = list(group)
        if sound:
            layers = [layer for numbers, _, _ in members for layer in numbers]
            names = "" if len({kind for _, kind, _ in members}) > 1 else members[0][1]
            rows.append((ranges(layers), *((names,) if several else ()), *members[0][2]))
        else:
            rows += [(str(numbers[0]), *((kind,) if several else ()), *cells) for numbers, kind, cells in members]
    head = ("layer", *(("kind",) if several else ()), *grid.classes)
    title = f"Layer x class: error over the control's, {_WITHIN} where within it, {NONE} where there is none"
    return Section(title, tables=[Table("", head, rows)], words=1 + several)


def _cell(ratio: float | None, hit: bool) -> str:
    if hit:
        return _ratio(ratio) if ratio is not None else "!"
    return NONE if ratio is None else _WITHIN


def _is_hit(cell: str) -> bool:
    return cell not in (NONE, _WITHIN)


def _metadata(record: InspectRecord) -> Table:
    rows = [
        (
            clean(row.key, 60),
            _value(row.artifact),
            _value(row.checkpoint),
            row.note or ("the forward" if row.used else "nothing here"),
        )
        for row in record.metadata
    ]
    return Table("", ("key", "artifact", "checkpoint", "read by"), rows)


def _value(value: Any) -> str:
    return "missing" if value is None else clean(value, _CELL)
