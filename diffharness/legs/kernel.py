"""The kernel leg: every node of the native graph against its replay from the engine's own inputs.

Each node is judged by its own inputs, so that a wrong one does not make its successors look wrong: all that are above
their floor are wrong themselves, and the first in the order of the graph is the one to look at. What has no replay is
named, and never counts as passed.

Floors: `kernel.<OP>.<TYPE>`, else `kernel.<OP>`, else `kernel.<TYPE>`, else `kernel`; the worst row of an output may be
`kernel.row_factor` times above. Beside that, native against strict is given as numbers that judge nothing: the two
differ by everything that the native run does to be fast.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from diffharness.legs.compare import logit_stats
from diffharness.metrics import LogitComparison
from diffharness.recorded import RecordedNode
from diffharness.records import Finding, KernelLeg, NodeRow, OpRow, WithoutReplay
from diffharness.replay.driver import Outcome, Replayed
from diffharness.settings import Floors
from diffharness.words import listed

NOTHING_REPLAYED = "numbers only: no node was replayed, so nothing is judged"
_SHOWN = 24  # failing nodes, and worst nodes, in the record
_LAYER = re.compile(r"(?:^|[^a-z])blk\.(\d+)\.|-(\d+)(?: |$)|_l(\d+)(?: |$)")
_NO_FLOOR = 0.0  # a floor that the tolerances lack is no excuse


@dataclass(frozen=True)
class KernelOutcome:
    """`first` is the node that is accused, the first failing one in graph order."""

    leg: KernelLeg
    findings: list[Finding] = field(default_factory=list)
    first: NodeRow | None = None
    layers: frozenset[int | None] = frozenset()  # that hold a failing node; None for nodes outside of all layers


def numbers(logits: LogitComparison | None, *, reason: str | None = None) -> KernelLeg:
    """A leg that replayed nothing; native engine (other) against strict engine (ref), or the `reason` for its lack."""
    if logits is None:
        return KernelLeg(status="not_run", reason=reason or "there is no native run to compare")
    return KernelLeg(status="not_run", reason=reason or NOTHING_REPLAYED, logits=logit_stats(logits))


def judge(outcome: Outcome, floors: Floors, *, n_batch: int = 0, n_single: int = 0) -> KernelOutcome:
    """The leg and its finding."""
    rows = [node_row(each, floors) for each in outcome.replayed]
    failing = [row for row in rows if not row.ok]
    leg = KernelLeg(
        status="fail" if failing else "pass" if rows else "not_run",
        nodes_replayed=len(rows) + outcome.n_views - sum(row.op in _VIEWS for row in rows),
        nodes_total=outcome.n_nodes,
        nodes_not_computed=outcome.n_not_computed + outcome.n_empty,
        n_batch=n_batch,
        n_single=n_single,
        ops=by_op(rows),
        without=[
            WithoutReplay(op=op, count=count, reason=outcome.refused.get(op))
            for op, count in sorted(outcome.without.items())
        ],
        failing=failing[:_SHOWN],
        worst=sorted(rows, key=_excess, reverse=True)[:_SHOWN],
        changed=outcome.changed,
    )
    leg.reason = _reason(leg, failing)
    if not failing:
        return KernelOutcome(leg)
    first = failing[0]
    finding = Finding(
        kind="engine.kernel",
        leg="kernel",
        message=_message(first, failing, rows),
        evidence={
            **first.model_dump(),
            "paths": sorted({row.path for row in failing if same_node(row, first)}),
            "failing": len(failing),
            "failing_ops": [row.model_dump() for row in leg.ops if row.failing],
        },
    )
    return KernelOutcome(leg, [finding], first, frozenset(row.layer for row in failing))


_VIEWS = frozenset({"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})


def with_cures(found: KernelOutcome, outcomes: Mapping[str, str]) -> KernelOutcome:
    """The outcome, its finding completed by what became of the accused node under other settings.

    `outcomes` maps what was changed to `cured`, `persists`, `absent` (the graph has no such node then) or how the
    engine ended.
    """
    if not outcomes or not found.findings:
        return found
    finding = found.findings[0]

    def that(outcome: str) -> list[str]:
        return [label for label, each in outcomes.items() if each == outcome]

    cures, avoids, persists = that("cured"), that("absent"), that("persists")
    told = "".join(
        f"; {words} {listed(labels, 6)}"
        for words, labels in (("right with", cures), ("not in the graph with", avoids))
        if labels
    ) or (f"; wrong also with {listed(persists, 6)}" if persists else "")
    evidence = {**finding.evidence, "cures": cures, "avoids": avoids, "persists": persists, "tried": dict(outcomes)}
    better = finding.model_copy(update={"message": finding.message + told, "evidence": evidence})
    return replace(found, findings=[better, *found.findings[1:]])


def agreement(leg: KernelLeg) -> str:
    """A leg that passed, in one sentence that also says what was not compared."""
    worst = f", the worst {leg.worst[0].op} {leg.worst[0].type} at NMSE {leg.worst[0].nmse:.1e}" if leg.worst else ""
    text = f"{leg.nodes_replayed} of {leg.nodes_total} nodes give what their inputs call for{worst}"
    return text + (f"; not compared: {_counts(leg.without)}" if leg.without else "") + "."


def floor_of(op: str, type_name: str, floors: Floors) -> float:
    """The most particular floor that there is."""
    for name in (f"kernel.{op}.{type_name}", f"kernel.{op}", f"kernel.{type_name}", "kernel"):
        found = floors.get(name, -1.0)
        if found >= 0:
            return found
    return _NO_FLOOR


def node_row(each: Replayed, floors: Floors) -> NodeRow:
    """One node, judged."""
    found, node = each.distance, each.node
    floor = floor_of(node.op, each.type, floors)
    row_floor = floor * floors.get("kernel.row_factor", 1.0)
    return NodeRow(
        node=node.name,
        op=node.op,
        type=each.type,
        nmse=found.nmse,
        path=node.path,
        occurrence=node.occurrence,
        layer=layer_of(each.weight, node.name, *_inherited(node)),
        tensor=each.weight,
        shape=list(node.out.shape),
        worst_row=found.worst_row,
        worst_row_nmse=found.worst_row_nmse,
        max_abs=found.max_abs,
        floor=floor,
        row_floor=row_floor,
        ok=each.note is None and found.nmse <= floor and found.worst_row_nmse <= row_floor,
        note=each.note,
    )


def same_node(a: NodeRow, b: NodeRow) -> bool:
    """Whether two rows are of the same node of the graph, on whatever path."""
    return (a.node, a.op, a.occurrence) == (b.node, b.op, b.occurrence)


def _inherited(node: RecordedNode) -> list[str]:
    """Names that tell where a node belongs that has none of its own; ggml calls it by its number."""
    return [source.name for source in node.sources if source is not None] if node.name.startswith("node_") else []


def layer_of(*names: str | None) -> int | None:
    """The first layer that one of the names tells: `blk.3.attn_q.weight`, `Qcur-3`, `cache_k_l3 (view)`."""
    for name in names:
        match = _LAYER.search(name) if name else None
        if match:
            return int(next(group for group in match.groups() if group))
    return None


def by_op(rows: Iterable[NodeRow]) -> list[OpRow]:
    """Rows pooled by op, type and path."""

    def key(row: NodeRow) -> tuple[str, str, str]:
        return row.op, row.type, row.path

    found = []
    for (op, type_name, path), group in groupby(sorted(rows, key=key), key=key):
        nodes = list(group)
        worst = max(nodes, key=_excess)
        found.append(
            OpRow(
                op=op,
                type=type_name,
                path=path,
                count=len(nodes),
                failing=sum(not node.ok for node in nodes),
                nmse=max(node.nmse for node in nodes),
                worst_row_nmse=max(node.worst_row_nmse or 0.0 for node in nodes),
                floor=worst.floor or _NO_FLOOR,
                node=worst.node,
            )
        )
    return found


def _excess(row: NodeRow) -> tuple[bool, float]:
    """How bad a row is: failing ones first, then by how near they are to their floors."""
    return not row.ok, max(row.nmse / (row.floor or 1e-300), (row.worst_row_nmse or 0.0) / (row.row_floor or 1e-300))


def _reason(leg: KernelLeg, failing: Sequence[NodeRow]) -> str | None:
    parts = []
    if failing:
        parts.append(_place(failing[0]))
    elif leg.status == "not_run":
        parts.append("no node was replayed")
    if leg.without:
        parts.append("not compared, for want of a replay: " + _counts(leg.without))
    if leg.changed:
        parts.append(f"the graph changed between runs of one shape: {leg.changed[0]}")
    return "; ".join(parts) or None


def _counts(without: Sequence[WithoutReplay]) -> str:
    return listed([f"{each.count} {each.op}" + (f" ({each.reason})" if each.reason else "") for each in without], 6)


def _place(row: NodeRow) -> str:
    what = ", ".join(part for part in (row.op, row.tensor, row.type) if part)
    if row.note:
        return f"{row.node} ({what}): {row.note}"
    if not row.nmse <= (row.floor or 0.0):
        measured = f"NMSE {row.nmse:.1e} (floor {row.floor:.0e})"
    else:
        measured = f"NMSE {row.worst_row_nmse or 0.0:.1e} in one row (floor {row.row_floor:.0e})"
    return f"{row.node} ({what}): {measured}, worst row {row.worst_row}"


def _message(first: NodeRow, failing: Sequence[NodeRow], rows: Sequence[NodeRow]) -> str:
    layer = f"layer {first.layer}, " if first.layer is not None else ""
    paths = {row.path for row in failing if same_node(row, first)}
    compared = {row.path for row in rows if same_node(row, first)}
    path = {
        frozenset({"batch"}): "for a batch of tokens" + (", not for a single one" if "single" in compared else ""),
        frozenset({"single"}): "for a single token" + (", not for a batch" if "batch" in compared else ""),
    }.get(frozenset(paths), "for a batch of tokens and for a single one")
    text = f"a kernel gives wrong numbers for right inputs: {layer}{_place(first)}, {path}"
    others = len(failing) - 1
    if others:
        text += f"; {others} more {'node is' if others == 1 else 'nodes are'} wrong by the same measure"
    return text
