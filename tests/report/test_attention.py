"""Attention health as a table and sentences."""

from __future__ import annotations

import pytest

from diffharness.records import Finding
from diffharness.records.attention import AttentionHealth, AttentionSide, HeadChange
from diffharness.report.attention import sections
from diffharness.report.document import Document, to_markdown, to_text


def side(entropy: float) -> AttentionSide:
    values = [[[entropy, entropy + 0.1], [entropy, None]] for _ in range(20)]
    return AttentionSide(entropy=values, first_share=[[[None, None]] * 2] * 20, effective_keys=values)


def health(*layers: int) -> AttentionHealth:
    changed = [
        HeadChange(
            layer=layer, kind="global", head=1, how="flattened", streams=["own"], start=16, stop=64,
            checkpoint=0.3, artifact=0.5 + layer / 100, limit=0.1,
        )
        for layer in layers
    ]  # fmt: skip
    return AttentionHealth(
        kinds=["global"] * 20,
        ranges=[(1, 16), (16, 64)],
        checkpoint=side(0.3),
        artifact=side(0.6),
        changed=changed,
        findings=[Finding(kind=None, leg="artifact", message="attention tends to uniform")] if layers else [],
    )


def test_nothing_changed_says_so_without_a_table() -> None:
    (section,) = sections(health())
    assert not section.tables
    assert section.remarks == ["no head's attention flattens or collapses beyond what quantization explains"]


def test_a_changed_layer_is_a_row_about_the_range_of_its_worst_head() -> None:
    (section,) = sections(health(3))
    (row,) = section.tables[0].rows
    assert row == ("3 (global)", "1", "16-63", "0.40 -> 0.70", "-", "-", "0.4 -> 0.7", "1: 0.30 -> 0.53")
    assert len(row) == len(section.tables[0].head)
    assert section.remarks == ["attention tends to uniform"]


def test_every_layer_if_asked_for() -> None:
    rows = sections(health(3), full=True)[0].tables[0].rows
    assert len(rows) == 20 and rows[0][1] == "0" and rows[0][-1] == "-"


def test_of_many_layers_those_that_changed_most() -> None:
    (section,) = sections(health(*range(20)))
    assert [row[0].split()[0] for row in section.tables[0].rows] == [str(layer) for layer in range(8, 20)]
    assert "12 of 20 layers" in section.remarks[-1]


@pytest.mark.parametrize("render", [to_text, to_markdown])
def test_it_renders(render: object) -> None:
    assert callable(render)
    assert "3 (global)" in render(Document("grade", "", "", sections(health(3))))
