"""The table of `matrix`: every status, places only where there are some, hostile names."""

from __future__ import annotations

from typing import Any

from diffharness.records import ArtifactSubject, Finding, FixtureSubject, LogitStats, Subject, Verdict
from diffharness.records.legs import Leg
from diffharness.records.matrix import CellRow, MatrixBase, MatrixRecord
from diffharness.report.document import to_markdown, to_text
from diffharness.report.matrix import document
from tests.report.conftest import EVIL

LOGITS = LogitStats(nmse=3.2e-5, kl_mean=1e-5, kl_p99=1e-4, kl_max=1e-3, top1=0.995, n=80)


def row(label: str, **changes: Any) -> CellRow:
    fields: dict[str, Any] = {
        "label": label, "dimension": "n_ubatch", "floor": "rounding", "status": "ok", "logits": LOGITS,
        "bound": 4e-4, "token_nmse": 1e-4, "token_bound": 1e-3, "strict": LOGITS, "control": 4e-5,
    }  # fmt: skip
    return CellRow(**(fields | changes))


def record(*rows: CellRow, **changes: Any) -> MatrixRecord:
    fields: dict[str, Any] = {
        "verdict": Verdict(primary="agree", all=["agree"], summary="All agree."),
        "leg": Leg(status="pass"),
        "base": MatrixBase(settings={"name": "native", "n_ubatch": 64}, strict=LOGITS, control="strict engine"),
        "cells": list(rows),
        "subject": Subject(
            artifact=ArtifactSubject(path="m.gguf", arch="llama"),
            fixture=FixtureSubject(name="f", n_tokens=80, n_scored=39),
        ),
        "repro": "diffharness matrix m.gguf",
    }
    return MatrixRecord(**(fields | changes))


def test_a_clean_table() -> None:
    shown = to_text(document(record(row("n_ubatch 7"), row("KV Q8_0", lossy=True))))
    assert "verdict: agree" in shown and "first at" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("n_ubatch 7")]
    assert line.split()[2:] == ["ok", "3.2e-05", "4.0e-04", "0.10", "1.0e-05", "99.50%", "3.2e-05"]
    assert "n_ubatch 64; 3.2e-05 NMSE from the strict engine" in shown
    assert "control with the same rounding of keys and values: KV Q8_0" in shown
    assert "cells     2 ok" in shown and "Reproduce: diffharness matrix m.gguf" in shown


def test_failures_crashes_and_cells_that_did_not_run() -> None:
    crash = Finding(kind="engine.crash", leg=None, message="the engine died (cell b) in node x")
    shown = to_text(
        document(
            record(
                row("a", status="fail", first_tap="blk.3.layer_out", first_token=17, reason="the cell is off"),
                row("b", status="crash", logits=None, bound=None, token_nmse=None, strict=None, first_tap="x"),
                row("c", status="not run", logits=None, bound=None, token_nmse=None, reason="it cannot"),
                row("d", against="halves"),
                base=MatrixBase(settings={}, survived="extra buffers off"),
                findings=[crash],
            )
        ),
        width=140,
    )
    assert "blk.3.layer_out @17" in shown and "first at" in shown
    assert "a: fail: the cell is off" in shown and "c: not run: it cannot" in shown
    assert "with extra buffers off, since it dies as asked for" in shown
    assert "compared with the base fed as `halves`" in shown and "the engine died (cell b)" in shown
    assert "cells     1 ok, 1 fail, 1 crash, 1 not run" in shown


def test_hostile_labels_are_harmless() -> None:
    found = document(record(row(EVIL, reason=EVIL)))
    assert "\x1b" not in to_text(found) and "\x1b" not in to_markdown(found)


def test_markdown_has_a_table() -> None:
    shown = to_markdown(document(record(row("n_ubatch 7"))))
    assert "| n_ubatch 7 | ok | 3.2e-05 |" in shown


def test_the_record_survives_its_json() -> None:
    made = record(row("a", token_nmse=float("inf")))
    assert MatrixRecord.model_validate_json(made.to_json()) == made
