"""The report of a replay: in 100 columns, with what was wrong, what was near, and what was not compared."""

from __future__ import annotations

from typing import Any

from diffharness.legs.kernel import by_op
from diffharness.records import ArtifactSubject, Finding, KernelLeg, NodeRow, Subject, Verdict, WithoutReplay
from diffharness.records.replay import ReplayRecord
from diffharness.report.document import to_markdown, to_text
from diffharness.report.replay import document


def node(name: str, nmse: float, **more: Any) -> NodeRow:
    told: dict[str, Any] = {
        "op": "MUL_MAT", "type": "IQ4_XS", "tensor": "blk.3.attn_output.weight", "worst_row_nmse": nmse,
        "worst_row": 17, "floor": 1e-6, "row_floor": 1e-4, "ok": nmse <= 1e-6, "layer": 3,
    }  # fmt: skip
    return NodeRow(node=name, nmse=nmse, **(told | more))


def record(kind: str, rows: list[NodeRow], **more: Any) -> ReplayRecord:
    failing = [row for row in rows if not row.ok]
    leg = KernelLeg(
        status="fail" if failing else "pass", nodes_replayed=len(rows), nodes_total=len(rows) + 3, n_batch=64,
        n_single=2, ops=by_op(rows), failing=failing, worst=rows, **more,
    )  # fmt: skip
    summary = "a kernel gives wrong numbers for right inputs." if failing else "all is well."
    return ReplayRecord(
        verdict=Verdict(primary=kind, all=[kind], summary=summary, next_step=None),  # type: ignore[arg-type]
        kernel=leg,
        findings=[Finding(kind="engine.crash", leg=None, message="the engine died before")] if failing else [],
        subject=Subject(artifact=ArtifactSubject(path="m.gguf")),
        repro="diffharness replay m.gguf",
    )


def text_of(found: ReplayRecord) -> str:
    text = to_text(document(found))
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_a_wrong_node_is_shown_with_its_table() -> None:
    rows = [node("node_1234-with-a-long-name", 0.25), node("Qcur-3", 1e-13), node("a", 0.5, path="single")]
    text = text_of(record("engine.kernel", rows))
    for words in (
        "verdict: engine.kernel",
        "Wrong nodes",
        "2.5e-01",
        "17",
        "single",
        "the engine died before",
        "Repro",
    ):
        assert words in text, text
    assert "Nearest" not in text and "3 of 6 nodes compared; 64 tokens as a batch, 2 alone" in " ".join(text.split())


def test_where_all_agrees_the_nearest_are_shown() -> None:
    text = text_of(record("agree", [node("Qcur-3", 1e-13)]))
    assert "Nearest to their floors" in text and "Wrong nodes" not in text and "Qcur-3" in text


def test_what_was_not_compared_is_shown() -> None:
    found = record("agree", [node("Qcur-3", 0.0)], without=[WithoutReplay(op="NEW_OP", count=3, reason="mode 9")])
    text = text_of(found)
    assert "Not compared" in text and "NEW_OP" in text and "mode 9" in text
    assert "| NEW_OP | mode 9 | 3 |" in to_markdown(document(found))


def test_a_leg_that_did_not_run() -> None:
    found = ReplayRecord(
        verdict=Verdict(primary="inconclusive", all=["inconclusive"], summary="Nothing was compared."),
        kernel=KernelLeg(reason="the engine died (recording its nodes)"),
        subject=Subject(artifact=ArtifactSubject(path="m\x1b[31m.gguf")),
    )
    text = text_of(found)
    assert "the engine died" in text and "\x1b" not in text
