"""A file that the engine refuses: the reason is told once, and what to do is not to give a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffharness.report.terminal import to_text
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import rewrite_gguf
from tests.e2e.conftest import MakePair
from tests.e2e.runs import whole_run


def test_a_refusal_is_told_once(make_pair: MakePair, tmp_path: Path) -> None:
    pair, gguf = make_pair("llama"), tmp_path / "odd.gguf"
    with open_gguf(pair.gguf) as source:
        n_rot = (
            source.metadata["llama.rope.dimension_count"] // 2
        )  # which the reference computes, and llama.cpp does not
        rewrite_gguf(source, gguf, kv={"llama.rope.dimension_count": n_rot})
    record = whole_run(replace(pair, gguf=gguf), noise=True)
    assert record.verdict.primary == "inconclusive" and "n_rot" in record.verdict.summary
    assert "odd.gguf" in record.verdict.summary, "the user's file, not the strict one"
    assert to_text(record).count("n_rot") == 1
    assert "Not simulated  see the verdict" in to_text(record)
    assert record.verdict.next_step is not None and "--engine" in record.verdict.next_step
    assert all(record.legs.get(name).reason for name in ("graph", "kernel", "settings")), "the record has all of it"


def test_nothing_of_it_on_a_file_that_is_taken(make_pair: MakePair) -> None:
    assert "see the verdict" not in to_text(whole_run(make_pair("llama"), noise=True))
