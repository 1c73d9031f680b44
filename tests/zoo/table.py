"""The kernel legs of many models in one table: by op, type and path."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffharness.records import KernelLeg, OpRow
from diffharness.report._format import scientific

Key = tuple[str, str, str]

_LINE = "| {:<17} | {:<5} | {:<6} | {:>6} | {:>6} | {:>7} | {:>9} | {:>7} | {} |"


@dataclass
class Pooled:
    """An op's nodes in all models."""

    models: int = 0
    nodes: int = 0
    nmse: float = 0.0
    worst_row_nmse: float = 0.0
    floor: float = 0.0
    where: str = ""  # model and node of `nmse`; empty where all is equal

    def add(self, model: str, row: OpRow) -> None:
        self.models += 1
        self.nodes += row.count
        self.floor = max(self.floor, row.floor)
        if row.nmse > self.nmse:
            self.where = f"{model}: {row.node}"
        self.nmse = max(self.nmse, row.nmse)
        self.worst_row_nmse = max(self.worst_row_nmse, row.worst_row_nmse)


@dataclass
class Table:
    """Of one engine's settings; `troubles` are sentences, one for each model that is not as it should be."""

    title: str
    rows: dict[Key, Pooled] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    models: int = 0
    nodes: int = 0

    def add(self, model: str, leg: KernelLeg) -> None:
        self.models += 1
        self.nodes += leg.nodes_replayed
        for row in leg.ops:
            self.rows.setdefault((row.op, row.type, row.path), Pooled()).add(model, row)
        if leg.status != "pass" or leg.without or leg.changed:
            self.troubles.append(f"{model}: {leg.reason or leg.status}")

    def lines(self) -> list[str]:
        """A Markdown table, ops in alphabetical order, and the troubles below."""
        head = _LINE.format("op", "type", "path", "models", "nodes", "NMSE", "worst row", "floor", "worst")
        body = [
            _LINE.format(
                *key, row.models, row.nodes, *map(scientific, (row.nmse, row.worst_row_nmse, row.floor)), row.where
            )
            for key, row in sorted(self.rows.items())
        ]
        title = f"{self.title}: {self.models} models, {self.nodes} nodes replayed, {len(self.troubles)} not clean"
        return [title, "", head, "|" + "---|" * 9, *body, *([""] if self.troubles else []), *self.troubles]
