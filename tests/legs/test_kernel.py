"""The kernel leg: who is accused, by which floor, and what is said of nodes that were not compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffharness import metrics
from diffharness.legs import kernel
from diffharness.recorded import RecordedNode, Value
from diffharness.replay.distance import Distance
from diffharness.replay.driver import Outcome, Replayed

FLOORS = {
    "kernel": 1e-7,
    "kernel.F32": 1e-10,
    "kernel.GELU": 1e-6,
    "kernel.MUL_MAT.Q4_K": 1e-9,
    "kernel.row_factor": 10,
}
NOTHING: Any = np.empty(0, np.uint8)


def row(op: str, type_name: str = "F32", nmse: float = 0.0, worst: float | None = None, **more: Any) -> Replayed:
    out = Value("n", "F32", (1, 1, 8, 4), (128, 128, 16, 4), NOTHING)
    told = {"index": 0, "name": "n-3", "params": np.zeros(16, np.int32), "out": out, "sources": (), "path": "batch"}
    node = RecordedNode(op=op, **(told | more))  # type: ignore[arg-type]
    found = Distance(nmse, 5, nmse if worst is None else worst, 0.1)
    return Replayed(node, type_name, "blk.3.attn_q.weight" if op == "MUL_MAT" else None, found)


def judged(*rows: Replayed, **more: Any) -> kernel.KernelOutcome:
    return kernel.judge(Outcome(replayed=list(rows), n_nodes=len(rows), **more), FLOORS)


@pytest.mark.parametrize(
    ("op", "type_name", "floor"),
    [("MUL_MAT", "Q4_K", 1e-9), ("MUL_MAT", "F32", 1e-10), ("GELU", "F32", 1e-6), ("ADD", "F16", 1e-7)],
)
def test_the_most_particular_floor_counts(op: str, type_name: str, floor: float) -> None:
    assert kernel.floor_of(op, type_name, FLOORS) == floor
    assert judged(row(op, type_name, 0.9 * floor)).leg.status == "pass"
    assert judged(row(op, type_name, 1.1 * floor)).leg.status == "fail"
    assert judged(row(op, type_name, 0.0, 9 * floor)).leg.status == "pass"
    assert judged(row(op, type_name, 0.0, 11 * floor)).leg.status == "fail"


def test_without_a_floor_nothing_may_differ() -> None:
    assert kernel.judge(Outcome(replayed=[row("ADD", nmse=1e-30)]), {}).leg.status == "fail"
    assert kernel.judge(Outcome(replayed=[row("ADD")]), {}).leg.status == "pass"


def test_the_first_wrong_node_is_accused() -> None:
    rows = [row("ADD"), row("MUL_MAT", "Q4_K", 2e-3, name="Qcur-3"), row("ADD", nmse=0.5, name="ffn_inp-4")]
    found = judged(*rows)
    (finding,) = found.findings
    assert found.first is not None and found.first.node == "Qcur-3" and finding.kind == "engine.kernel"
    for words in ("layer 3", "Qcur-3 (MUL_MAT, blk.3.attn_q.weight, Q4_K)", "2.0e-03", "worst row 5", "1 more node is"):
        assert words in finding.message, finding.message
    assert finding.evidence["tensor"] == "blk.3.attn_q.weight" and finding.evidence["failing"] == 2
    assert found.layers == {3, 4} and [r.node for r in found.leg.failing] == ["Qcur-3", "ffn_inp-4"]
    assert "Qcur-3" in (found.leg.reason or "")


def test_on_which_path() -> None:
    def message(batch: float, single: float | None) -> str:
        rows = [row("MUL_MAT", nmse=batch)]
        rows += [] if single is None else [row("MUL_MAT", nmse=single, path="single")]
        return judged(*rows).findings[0].message

    assert "for a batch of tokens, not for a single one" in message(1.0, 0.0)
    assert "for a single token, not for a batch" in message(0.0, 1.0)
    assert "for a batch of tokens and for a single one" in message(1.0, 1.0)
    assert message(1.0, None).endswith("for a batch of tokens")


def test_what_was_not_compared_is_named() -> None:
    more = {"without": Counter({"NEW_OP": 3}), "refused": {"NEW_OP": "mode 9"}}
    found = judged(row("ADD"), **more)
    assert found.leg.status == "pass" and found.leg.without[0].count == 3
    assert "3 NEW_OP (mode 9)" in (found.leg.reason or "") and "3 NEW_OP" in kernel.agreement(found.leg)
    nothing = judged(**more)
    assert nothing.leg.status == "not_run" and "no node was replayed" in (nothing.leg.reason or "")
    assert "changed" in (judged(row("ADD"), changed=["node 3 was a, and then b"]).leg.reason or "")


def test_a_note_alone_convicts() -> None:
    noted = replace(row("ARGSORT"), note="an index is chosen twice")
    assert "chosen twice" in judged(noted).findings[0].message


def test_infinite_and_undefined_errors_convict() -> None:
    for nmse in (float("inf"), float("nan")):
        assert judged(row("ADD", nmse=nmse)).leg.status == "fail"


def test_the_table_by_op() -> None:
    rows = [row("ADD", nmse=1e-12), row("ADD", nmse=3e-12, name="worst-1"), row("ADD", path="single"), row("MUL")]
    table = judged(*rows).leg.ops
    assert [(r.op, r.path, r.count, r.nmse) for r in table] == [
        ("ADD", "batch", 2, 3e-12), ("ADD", "single", 1, 0.0), ("MUL", "batch", 1, 0.0)
    ]  # fmt: skip
    assert table[0].node == "worst-1" and table[0].floor == 1e-10


def test_cures_complete_the_finding() -> None:
    found = judged(row("MUL_MAT", nmse=1.0))
    better = kernel.with_cures(found, {"again": "persists", "extra buffers off": "cured", "one thread": "SIGSEGV"})
    (finding,) = better.findings
    assert finding.message.endswith("right with extra buffers off")
    assert (finding.evidence["cures"], finding.evidence["persists"]) == (["extra buffers off"], ["again"])
    assert finding.evidence["tried"]["one thread"] == "SIGSEGV"
    assert "wrong also with again" in kernel.with_cures(found, {"again": "persists"}).findings[0].message
    assert kernel.with_cures(judged(row("ADD")), {"again": "cured"}).findings == []


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blk.12.ffn_up.weight", 12), ("Qcur-3", 3), ("cache_k_l7 (view)", 7), ("ffn_inp-4 (reshaped)", 4),
        ("node_17", None), ("result_output", None), ("leaf_3", None), ("kq-12", 12),
    ],
)  # fmt: skip
def test_layers_by_name(name: str, layer: int | None) -> None:
    assert kernel.layer_of(None, name) == layer


def test_numbers_are_given_and_nothing_is_judged() -> None:
    strict = np.random.default_rng(0).standard_normal((8, 30)).astype(np.float32)
    native = strict + np.float32(0.1)
    native[3, 4] += 5
    leg = kernel.numbers(metrics.compare_logits(strict, native))
    assert leg.status == "not_run" and "numbers only" in (leg.reason or "")
    assert leg.logits is not None and leg.logits.nmse > 0.01 and leg.logits.n == 8


def test_without_a_native_run_the_reason_says_so() -> None:
    assert kernel.numbers(None, reason="the native engine died").reason == "the native engine died"
