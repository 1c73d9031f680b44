"""The table itself, without the models."""

from __future__ import annotations

from typing import Any

from diffharness.records import KernelLeg, OpRow, WithoutReplay
from tests.zoo.table import Table


def leg(nmse: float, **changes: Any) -> KernelLeg:
    row = OpRow(op="MUL_MAT", type="F32", path="batch", count=3, nmse=nmse, worst_row_nmse=nmse, floor=1e-10, node="x")
    return KernelLeg(**{"status": "pass", "nodes_replayed": 3, "ops": [row], **changes})


def test_models_are_pooled_and_the_worst_is_named() -> None:
    table = Table("native")
    table.add("a", leg(1e-13))
    table.add("b", leg(1e-12))
    table.add("c", leg(0.0))
    (row,) = table.rows.values()
    assert (row.models, row.nodes, row.nmse, row.where) == (3, 9, 1e-12, "b: x")
    assert not table.troubles
    assert "1.0e-12" in table.lines()[4] and "3 models, 9 nodes" in table.lines()[0]


def test_whatever_is_not_clean_is_a_trouble() -> None:
    table = Table("native")
    table.add("wrong", leg(1.0, status="fail", reason="node x is wrong"))
    table.add("unknown", leg(0.0, without=[WithoutReplay(op="FLIP", count=1)], reason="not compared: 1 FLIP"))
    table.add("moving", leg(0.0, changed=["node 3"], reason="the graph changed"))
    table.add("dead", leg(0.0, status="not_run", reason="the engine died"))
    assert [trouble.split(":")[0] for trouble in table.troubles] == ["wrong", "unknown", "moving", "dead"]
    assert table.lines()[-1] == "dead: the engine died"
