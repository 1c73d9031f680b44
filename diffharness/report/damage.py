"""What was done to a damaged copy, and the list of what can be done."""

from __future__ import annotations

from diffharness.records.damage import ChangeRow, DamageRecord, FaultRow
from diffharness.report._format import NONE, size
from diffharness.report.document import Document, Section, Table
from diffharness.words import counted

_SHOWN = 40  # rows; the record has them all


def document(record: DamageRecord) -> Document:
    """The copy's changes as one table; the table of faults where the record lists those."""
    return _list(record.faults) if record.faults else _copy(record)


def _copy(record: DamageRecord) -> Document:
    changed = [row for row in record.changes if row.changed]
    tensors, keys = [row for row in changed if row.type], [row for row in changed if not row.type]
    parts = [f"{len(tensors)} of {record.n_tensors} tensors"] if tensors or not keys else []
    parts += [counted(len(keys), "metadata key")] if keys else []
    summary = f"{record.out}: {' and '.join(parts)} changed"
    pairs = [("faults", ", ".join(record.how) or NONE), ("seed", str(record.seed)), ("source", record.source or NONE)]
    pairs += [("clean values", record.checkpoint or "the source's own"), ("size", size(record.n_bytes))]
    remarks = []
    if record.truncated_from is not None:
        summary = f"{record.out}: the first {size(record.n_bytes)} of {size(record.truncated_from)}, no whole GGUF"
    rest = len(record.changes) - _SHOWN
    if rest > 0:
        remarks.append(f"and {rest} more: --json has them all")
    unchanged = len(record.changes) - len(changed)
    if unchanged:
        remarks.append(f"{unchanged} came out the same to the bit: their type rounds the difference away")
    table = Table("", ("tensor or key", "type", "what was done"), [_cells(row) for row in record.changes[:_SHOWN]])
    section = Section(pairs=pairs, tables=[table] if record.changes else [], remarks=remarks, words=3)
    return Document("damage", "", summary, [section])


def _cells(row: ChangeRow) -> tuple[str, str, str]:
    return row.name, row.type or "key", row.what if row.changed else f"{row.what}: no change to the bit"


def _list(faults: list[FaultRow]) -> Document:
    head = ("name", "what it does, and where", "strength", "shows as")
    rows = [(f.name, f.what + (f" ({f.tensors})" if f.tensors else ""), _strength(f), f.shows) for f in faults]
    return Document("damage", "", counted(len(faults), "fault"), [Section(tables=[Table("", head, rows)], words=4)])


def _strength(fault: FaultRow) -> str:
    return NONE if fault.strength is None else f"{fault.strength:g}: {fault.means}"
