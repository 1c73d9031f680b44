"""Several engines in the reports of a run; nothing where one ran alone."""

from __future__ import annotations

from diffharness.cli import _output
from diffharness.records import EngineRow, RunRecord
from diffharness.report import html, markdown, terminal
from tests.report.conftest import EVIL, stats
from tests.report.conftest import hostile as hostile  # fixtures that this file shares
from tests.report.conftest import plain as plain

ROWS = [
    EngineRow(name="native", status="first", version="1.2", commit="beef", ppl=41.5675, strict=1.2e-12),
    EngineRow(name="venv-old", status="differs", ppl=41.1575, logits=stats(1e-3), strict=1.3e-12,
              first_tap="blk.0.attn_q", first_token=1, settings={"type_k": "Q8_0"}),
    EngineRow(name="dead", status="not_run", reason="it died of SIGILL"),
]  # fmt: skip


def test_every_form_has_the_table(plain: RunRecord) -> None:
    for render in (terminal.to_text, markdown.to_markdown, html.to_html):
        assert "Engines: native logits" not in render(plain)
        text = render(plain.model_copy(update={"engines": ROWS}))
        told = (
            "Engines: native logits",
            "venv-old",
            "41.1575",
            "1.3e-12",
            "blk.0.attn",
            "not run",
            "it died of SIGILL",
        )
        assert all(part in text for part in told), text


def test_what_it_quotes_is_harmless(hostile: RunRecord) -> None:
    row = EngineRow(name=EVIL, status="not_run", reason=EVIL * 9, version=EVIL, first_tap=EVIL, settings={EVIL: EVIL})
    record = hostile.model_copy(update={"engines": [row] * 3})
    assert "\x1b" not in terminal.to_text(record) and "<script>" not in html.to_html(record)
    assert len(markdown.to_markdown(record).splitlines()) <= markdown.MAX_LINES


def test_one_line_says_verdict_and_first_divergence(plain: RunRecord, hostile: RunRecord) -> None:
    assert terminal.line(plain).startswith("agree: everything that was compared agrees (graph).")
    assert terminal.line(hostile).startswith("engine.graph, tokens: First divergence in the graph leg at x")


def test_one_line_ends_with_the_next_step(plain: RunRecord) -> None:
    command = f"diffharness run {'long/' * 200}model.gguf"
    verdict = plain.verdict.model_copy(update={"next_step": command, "summary": "s" * 9000})
    shown = terminal.line(plain.model_copy(update={"verdict": verdict}))
    assert shown.endswith(f". Next: {command}") and len(shown) < _output.LINE
    none = verdict.model_copy(update={"next_step": None, "summary": "everything agrees."})
    assert terminal.line(plain.model_copy(update={"verdict": none})) == "agree: everything agrees."
