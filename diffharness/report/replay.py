"""What a replay prints: the verdict, a line per op and type, the nodes that are wrong or nearest to it."""

from __future__ import annotations

from collections.abc import Sequence

from diffharness.records import KernelLeg, NodeRow, OpRow
from diffharness.records.replay import ReplayRecord
from diffharness.report import _content
from diffharness.report._format import NONE, scientific
from diffharness.report.document import Document, Section, Table

_FAILING = 12
_NEAREST = 5


def document(record: ReplayRecord) -> Document:
    """The report, for a terminal of 100 columns and for Markdown."""
    leg = record.kernel
    sections = [Section(pairs=_subject(record)), *sections_of(leg)]
    told = record.verdict.summary.rstrip(".")
    findings = [f"{f.kind or 'note'}: {f.message}" for f in record.findings if f.message.rstrip(".") not in told]
    remarks = findings + ([leg.reason] if leg.reason and leg.reason not in told else [])
    if remarks:
        sections.append(Section("Findings", remarks=remarks))
    commands = [("Next", record.verdict.next_step), ("Reproduce", record.repro)]
    return Document(
        command="replay",
        outcome=record.verdict.primary,
        summary=record.verdict.summary,
        sections=sections,
        commands=[(label, command) for label, command in commands if command],
    )


def sections_of(leg: KernelLeg) -> list[Section]:
    """The kernel leg's tables, also for another command's report."""
    sections = []
    if leg.ops:
        sections.append(Section("By op and type, the worst node of each", tables=[_ops(leg.ops)], words=3))
    if leg.failing:
        title = "Wrong nodes, in the order of the graph"
        sections.append(Section(title, tables=[_nodes(leg.failing[:_FAILING])], words=3))
    elif leg.worst:
        sections.append(Section("Nearest to their floors", tables=[_nodes(leg.worst[:_NEAREST])], words=3))
    if leg.without:
        rows = [(each.op, each.reason or NONE, str(each.count)) for each in leg.without]
        table = Table("", ("op", "why", "nodes"), rows)
        sections.append(Section("Not compared: no replay", tables=[table], words=2))
    return sections


def _subject(record: ReplayRecord) -> list[tuple[str, str]]:
    leg, rows = record.kernel, _content.about(record.subject)
    if not leg.nodes_total:
        return rows
    nodes = f"{leg.nodes_replayed} of {leg.nodes_total} nodes compared"
    if leg.nodes_not_computed:
        nodes += f", {leg.nodes_not_computed} of no need or empty"
    return [*rows, ("replayed", f"{nodes}; {leg.n_batch} tokens as a batch, {leg.n_single} alone")]


def _ops(rows: Sequence[OpRow]) -> Table:
    head = ("op", "type", "tokens", "nodes", "wrong", "NMSE", "worst row", "floor")
    return Table("", head, [_op(row) for row in rows])


def _op(row: OpRow) -> tuple[str, ...]:
    numbers = (scientific(row.nmse), scientific(row.worst_row_nmse), scientific(row.floor))
    return row.op, row.type, row.path, str(row.count), str(row.failing or NONE), *numbers


def _nodes(rows: Sequence[NodeRow]) -> Table:
    head = ("node", "op", "tensor", "tokens", "NMSE", "floor", "worst row", "its NMSE")
    return Table("", head, [_node(row) for row in rows])


def _node(row: NodeRow) -> tuple[str, ...]:
    what = f"{row.op} {row.type}"
    worst = NONE if row.worst_row is None else str(row.worst_row)
    numbers = (scientific(row.nmse), scientific(row.floor), worst, scientific(row.worst_row_nmse))
    return row.node, what, row.tensor or NONE, row.path, *numbers
