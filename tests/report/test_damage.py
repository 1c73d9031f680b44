"""The table of a damaged copy: what changed, what did not, and what is left out of the table."""

from __future__ import annotations

from diffharness.records.damage import ChangeRow, DamageRecord
from diffharness.report.damage import document
from diffharness.report.document import to_markdown, to_text


def change(i: int, *, changed: bool = True, kind: str | None = "Q4_K") -> ChangeRow:
    return ChangeRow(name=f"blk.{i}.attn_q.weight", type=kind, what="times 1.1", changed=changed)


def test_changes_are_counted_and_shown() -> None:
    record = DamageRecord(source="a", out="b", how=["scale:1.1"], n_tensors=9, changes=[change(0), change(1)])
    text = to_text(document(record))
    assert "b: 2 of 9 tensors changed" in text and "blk.1.attn_q.weight" in text and "scale:1.1" in text


def test_what_the_type_rounded_away_is_told() -> None:
    record = DamageRecord(out="b", n_tensors=9, changes=[change(0), change(1, changed=False)])
    text = to_text(document(record))
    assert "1 of 9 tensors" in text and "no change to the bit" in text and "1 came out the same" in text


def test_long_tables_are_cut_and_said_to_be() -> None:
    record = DamageRecord(out="b", n_tensors=90, changes=[change(i) for i in range(60)])
    assert "and 20 more" in to_markdown(document(record))


def test_a_key_alone_and_a_cut_file() -> None:
    record = DamageRecord(out="b", n_tensors=9, changes=[change(0, kind=None)])
    assert "b: 1 metadata key changed" in to_text(document(record))
    record = DamageRecord(out="b", n_tensors=9, n_bytes=1024, truncated_from=4096)
    assert "first 1.0 KiB of 4.0 KiB, no whole GGUF" in to_text(document(record))
