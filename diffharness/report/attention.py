"""Attention health as sections of a report: what was found, in sentences, and a table of layers."""

from __future__ import annotations

from collections.abc import Sequence

from diffharness.records.attention import AttentionHealth, AttentionSide, HeadChange, Values
from diffharness.report._format import NONE, decimals
from diffharness.report.document import Section, Table

_LAYERS = 12  # shown unless all are asked for, those with the largest change
_HEAD = ("layer", "heads", "positions", "entropy", "control's", "first token", "effective keys", "worst head")


def sections(health: AttentionHealth, *, title: str = "Attention", full: bool = False) -> list[Section]:
    """One section: the findings, and a row for each layer in which a head changed; of every layer if `full`.

    A row is about one range of positions, that in which the layer's heads changed most: means over all of the
    layer's heads of the relative entropy, the first token's share and the effective number of keys.
    """
    by_layer: dict[int, list[HeadChange]] = {}
    for head in health.changed:
        by_layer.setdefault(head.layer, []).append(head)
    remarks = [finding.message for finding in health.findings]
    layers = list(range(len(health.kinds))) if full else list(by_layer)
    if not full and len(layers) > _LAYERS:
        layers = sorted(sorted(layers, key=lambda layer: -max(map(_change, by_layer[layer])))[:_LAYERS])
        remarks.append(f"the table has the {_LAYERS} of {len(by_layer)} layers that changed most")
    if not by_layer:
        remarks.append("no head's attention flattens or collapses beyond what quantization explains")
    rows = [_row(health, layer, by_layer.get(layer, [])) for layer in layers]
    named = "heads that changed; checkpoint -> artifact: entropy over that of uniform attention, mean over heads"
    tables = [Table(named, _HEAD, rows, numeric=True)] if rows else []
    return [Section(title, tables=tables, remarks=remarks)]


def _row(health: AttentionHealth, layer: int, changed: Sequence[HeadChange]) -> tuple[str, ...]:
    worst = max(changed, key=_change, default=None)
    starts = [start for start, _ in health.ranges]
    i = starts.index(worst.start) if worst is not None else len(starts) - 1
    start, stop = health.ranges[i]

    def both(of: str, places: int) -> str:
        sides = [decimals(_mean(side, of, layer, i), places) for side in (health.checkpoint, health.artifact)]
        return NONE if sides == [NONE, NONE] else " -> ".join(sides)

    return (
        f"{layer} ({health.kinds[layer]})",
        str(len(changed)),
        f"{start}-{stop - 1}",
        both("entropy", 2),
        NONE if health.control is None else decimals(_mean(health.control, "entropy", layer, i), 2),
        both("first_share", 2),
        both("effective_keys", 1),
        NONE if worst is None else f"{worst.head}: {worst.checkpoint:.2f} -> {worst.artifact:.2f}",
    )


def _change(head: HeadChange) -> float:
    return abs(head.artifact - head.checkpoint)


def _mean(side: AttentionSide, of: str, layer: int, i: int) -> float | None:
    values: Values = getattr(side, of)
    known = [x for x in (head[i] for head in values[layer]) if x is not None]
    return sum(known) / len(known) if known else None
