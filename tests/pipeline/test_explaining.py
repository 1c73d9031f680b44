"""`explain` in the pipeline: which tokens hypotheses are tried on, and what a run that cannot be explained becomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffharness.cli._models import embedded
from diffharness.fixture import from_ids
from diffharness.pipeline import engine_runs, explaining
from diffharness.pipeline.engine_runs import EngineRuns
from diffharness.pipeline.explaining import chunks_at, explain, further, told
from diffharness.pipeline.request import RunRequest
from diffharness.records import Finding
from diffharness.records.explain import Explanation
from diffharness.settings import load_engine, load_tolerances


def rows(place: object, row: int, *, n: int = 1500, chunk: int = 500, n_vocab: int = 100) -> list[tuple[int, int]]:
    fixture = from_ids(list(range(3, n + 3)), name="x", chunk=chunk)
    found = chunks_at(fixture, place, row, n_vocab)  # type: ignore[arg-type]
    for one in found:
        assert np.array_equal(one.ids, np.asarray(fixture.ids)[one.rows])
    return [(one.rows.start, one.rows.stop) for one in found]


def test_the_chunk_that_fails_first_is_tried() -> None:
    assert rows(0, 0) == [(0, 256)]
    assert rows(0, 700) == [(500, 764)]
    assert rows(0, 999) == [(500, 1000)]


def test_short_chunks_are_tried_together() -> None:
    assert rows(0, 130, n=640, chunk=64) == [(128, 192), (192, 256), (256, 320), (320, 384)]


def test_the_head_gets_few_tokens_of_a_large_vocabulary() -> None:
    assert rows("head", 700, n_vocab=1 << 20) == [(698, 714)]
    assert rows("head", 1499, n_vocab=1 << 20) == [(1484, 1500)]
    assert rows("head", 0) == [(0, 500)]


def request() -> RunRequest:
    own = embedded()
    engine = load_engine("native").changed(threads=1)
    return RunRequest(model=own.model, engine=engine, tolerances=load_tolerances(), fixture=own.fixture, n_tokens=32)


def test_an_engine_that_dies_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = Finding(kind="engine.crash", leg=None, message="the engine died", evidence={"survives": None})
    runs = EngineRuns(reason="the engine died", findings=[crash])
    monkeypatch.setattr(engine_runs, "run_strict", lambda work, path: runs)
    record = explain(request())
    assert record.verdict.primary == "engine.crash" and record.explanation is None
    assert record.graph.status == "not_run" and record.graph.reason == "the engine died"


def test_the_finding_says_what_explains_it() -> None:
    finding = Finding(kind="engine.graph", leg="graph", message="it differs", evidence={"tap": "logits"})
    better = told(finding, Explanation(answer="the engine behaves as if x were y", found=True))
    assert better.message == "it differs; the engine behaves as if x were y"
    assert better.evidence["tap"] == "logits" and better.evidence["explanation"]["found"] is True
    assert explaining.BUDGET > 0


def test_what_nothing_explains_has_a_next_step() -> None:
    asked = replace(request(), model=Path("a b.gguf"), fixture="english", overrides=("llama.x=int:3",))
    nothing = Explanation(answer="none fits.", found=False, budget=600)
    assert further(asked, nothing, "run") == (
        "diffharness explain 'a b.gguf' --fixture english --tokens 32 --override-kv llama.x=int:3"
    )
    nodes = "diffharness replay 'a b.gguf' --fixture english --override-kv llama.x=int:3"
    assert further(asked, nothing, "explain") == nodes
    ended = nothing.model_copy(update={"exhausted": True})
    assert "explain 'a b.gguf' --budget 2400 " in further(asked, ended, "explain")

    finding = Finding(kind="engine.graph", leg="graph", message="it differs")
    assert told(finding, nothing, nodes).next_step == nodes
    assert told(finding, Explanation(answer="as if x were y", found=True), nodes).next_step is None
