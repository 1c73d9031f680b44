"""What a restoration prints: the verdict, the ladders between artifact and checkpoint, the smallest set found."""

from __future__ import annotations

import math

from diffharness.records.restore import GroupScore, MixtureScore, RestoreRecord, SearchResult, Side
from diffharness.report import _content
from diffharness.report._format import NONE, decimals, scientific
from diffharness.report.document import Document, Section, Table

_CLOSE = 3  # decimals of a change in nats
_LISTED = 8  # groups named one by one beside their words
_HEAD = ("", "tensors", "drifted", "perplexity", "change", "+-", "mean KL", "")
_TITLES: dict[Side, str] = {
    "artifact": "Restored: one group of the checkpoint in the artifact",
    "checkpoint": "Harm: one group of the artifact in the checkpoint",
}


def document(record: RestoreRecord) -> Document:
    """The report, for a terminal of 100 columns and for Markdown."""
    sections = [Section(pairs=_subject(record))]
    sides: list[Side] = ["artifact", "checkpoint"]
    for side in sides:
        rows = [group for group in record.groups if group.into == side]
        if rows:
            sections.append(Section(_TITLES[side], tables=[_ladder(record, rows, side)]))
    if record.groups:
        sections[-1] = _with_legend(sections[-1])
    if record.search is not None:
        sections.append(_search(record.search, record.scores))
    told = record.verdict.summary
    remarks = [f"{f.kind or 'note'}: {f.message}" for f in record.findings if f.message not in told]
    if remarks:
        sections.append(Section("Findings", remarks=remarks))
    commands = [("Next", record.verdict.next_step), ("Reproduce", record.repro)]
    return Document(
        command="restore",
        outcome=record.verdict.primary,
        summary=record.verdict.summary,
        sections=sections,
        commands=[(label, command) for label, command in commands if command],
    )


def _subject(record: RestoreRecord) -> list[tuple[str, str]]:
    about = record.subject
    rows = [("artifact", about.artifact.path)]
    if about.checkpoint is not None:
        rows.append(("checkpoint", about.checkpoint.path))
    if about.fixture is not None:
        rows.append(("fixture", _content.tokens(about.fixture)))
    full = record.forwards * max(1, len(record.layer_kinds))
    share = f", {record.layers_run / full:.0%} of their layers run" if full else ""
    rows.append(("forwards", f"{record.forwards}{share}"))
    if record.lineage is not None and record.lineage.additivity is not None:
        rows.append(("additivity of KL", f"{record.lineage.additivity:.2f} (1: the parts know nothing of each other)"))
    return rows


def _ladder(record: RestoreRecord, rows: list[GroupScore], side: Side) -> Table:
    base, goal = ("artifact", "checkpoint") if side == "artifact" else ("checkpoint", "artifact")
    cells = [_end(base, record.scores[base])]
    cells += [_row(row) for row in rows]
    if "control" in record.scores:
        cells.append(_end("control", record.scores["control"]))
    cells.append(_end(goal, record.scores[goal]))
    return Table("", _HEAD, cells, numeric=True)


def _end(name: str, score: MixtureScore) -> tuple[str, ...]:
    return (name, "", "", decimals(score.ppl), "", "", scientific(score.kl_mean), "")


def _row(row: GroupScore) -> tuple[str, ...]:
    told = "equal" if row.change == 0.0 else "" if row.told == "same" else row.told
    error = NONE if row.error is None else decimals(row.error, _CLOSE)
    n = len(row.tensors) + len(row.keys)
    change = NONE if math.isnan(row.change) else f"{row.change:+.{_CLOSE}f}"  # from infinite to infinite
    return (row.group, str(n), str(row.drifted), decimals(row.ppl), change, error, scientific(row.kl_mean), told)


def _with_legend(section: Section) -> Section:
    text = "change: NLL in nats a token, with its standard error; better or worse only where it is beyond noise"
    return Section(section.title, section.pairs, section.tables, [*section.remarks, text], section.words)


def _search(found: SearchResult, scores: dict[str, MixtureScore]) -> Section:
    pairs = [
        ("target", f"perplexity {decimals(found.target)} of the {found.target_of}, within {found.within:.2%}"),
        ("put back", found.words if found.reached else "everything, and it was not enough"),
    ]
    if found.score is not None:
        before = decimals(scores["artifact"].ppl)
        pairs.append(
            ("perplexity", f"{before} -> {decimals(found.score.ppl)}, mean KL {scientific(found.score.kl_mean)}")
        )
    if found.reached:
        listed = f": {'; '.join(found.groups)}" if len(found.groups) <= _LISTED else ""
        pairs.append(("groups", f"{len(found.groups)}{listed}"))
        pairs.append(("smallest", _smallest(found)))
    pairs.append(("forwards", f"{found.forwards} of at most {found.budget}"))
    return Section("Search: what has to be put back", pairs=pairs)


def _smallest(found: SearchResult) -> str:
    if not found.minimal:
        return "not known: the budget ended while groups were still being left out"
    if not found.finest:
        return "none of the groups can be left out; the budget ended before they were cut into fewer layers"
    return "none of the groups can be left out, nor cut into fewer layers"
