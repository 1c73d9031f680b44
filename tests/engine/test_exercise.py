"""The worker that serves cells: ways of feeding agree, what cannot be done is said, and a death is one cell's."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from diffharness.engine.crash import EngineCrash
from diffharness.engine.exercising import LOGITS, Exerciser, Text, delete
from diffharness.engine.feeding import Feed, Way
from diffharness.engine.runner import Engine
from diffharness.metrics import nmse
from diffharness.settings import EngineSettings

from .conftest import GEMMA, N_VOCAB, MakeGguf
from .planted_cells import planted_cells

SETTINGS = EngineSettings(threads=1, time_limit_s=120, type_k="F32", type_v="F32", flash_attn="off")
SAME_TEXT = [way for way in get_args(Way) if way not in ("cut", "cut_and_shifted")]


@pytest.fixture
def text(llama_gguf: Path, ids: list[int]) -> Text:
    """Two chunks, the second shorter."""
    return Text(llama_gguf, "llama", [np.array(ids), np.array(ids[5:21])])


def test_every_way_of_feeding_gives_the_same(text: Text, tmp_path: Path) -> None:
    chunks = [chunk.tolist() for chunk in text.chunks]
    base = Engine(SETTINGS).capture(text.model, chunks, tmp_path / "base", taps=()).open().read(LOGITS)
    with Exerciser(text) as cells:
        for way in SAME_TEXT:
            run = cells.run(SETTINGS, tmp_path / "cell", feed=Feed(way=way, size=7))
            assert run.not_run is None
            capture = run.open()
            for name, rows in run.rows.items():
                found = capture.read(name)
                assert nmse(found[rows], base[rows]) < 1e-9, (way, name)
                rest = np.setdiff1d(np.arange(len(base)), rows)
                assert np.isnan(found[rest]).all()
            delete(run)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_context_shift_changes_no_value(text: Text, tmp_path: Path) -> None:
    logits = {}
    with Exerciser(text) as cells:
        for way in ("whole", "cut", "cut_and_shifted"):
            run = cells.run(SETTINGS, tmp_path / way, feed=Feed(way=way))
            logits[way] = run.open().read(LOGITS)[run.rows[LOGITS]]
    assert nmse(logits["cut_and_shifted"], logits["cut"]) < 1e-9
    assert nmse(logits["cut"], logits["whole"][-len(logits["cut"]) :]) > 1e-4  # another text


def test_sequences_do_not_see_each_other(text: Text, tmp_path: Path) -> None:
    with Exerciser(text) as cells:
        for unified in (False, True):
            run = cells.run(SETTINGS.changed(kv_unified=unified), tmp_path / "c", feed=Feed(way="sequences", count=4))
            capture = run.open()
            assert sorted(run.rows) == [LOGITS, "logits@3"]
            assert nmse(capture.read("logits@3"), capture.read(LOGITS)) < 1e-9


def test_taps_follow_the_tokens(text: Text, tmp_path: Path) -> None:
    chunks = [chunk.tolist() for chunk in text.chunks]
    taps = ("blk.*.layer_out",)
    base = Engine(SETTINGS).capture(text.model, chunks, tmp_path / "base", taps=taps).open()
    with Exerciser(text) as cells:
        for way in ("whole", "one_by_one", "redecoded"):
            capture = cells.run(SETTINGS, tmp_path / "c", feed=Feed(way=way), taps=taps).open()
            assert capture.taps == ["blk.0.layer_out", "blk.1.layer_out", LOGITS]
            assert nmse(capture.read("blk.1.layer_out"), base.read("blk.1.layer_out")) < 1e-9


def test_what_is_refused_is_said_and_the_next_cell_runs(text: Text, tmp_path: Path) -> None:
    with Exerciser(text) as cells:
        with pytest.raises(EngineCrash) as caught:
            cells.run(SETTINGS.changed(type_k="F32", type_v="Q8_0", flash_attn="auto", n_seq_max=64), tmp_path / "c")
        assert caught.value.kind in ("refused", "oom") or caught.value.message
        assert cells.run(SETTINGS, tmp_path / "d").capture is not None


def test_a_death_is_one_cells_and_leaves_nothing(text: Text, tmp_path: Path) -> None:
    python = planted_cells(tmp_path / "bin", "SIGSEGV", when="settings['n_ubatch'] == 7", node="ffn_gate-1")
    settings = SETTINGS.changed(python=python)
    out = tmp_path / "out"
    out.mkdir()
    with Exerciser(text) as cells:
        before = cells.run(settings, out / "a").open().read(LOGITS)
        with pytest.raises(EngineCrash) as caught:
            cells.run(settings.changed(n_ubatch=7), out / "b")
        assert (caught.value.kind, caught.value.signal_name) == ("signal", "SIGSEGV")
        with pytest.raises(EngineCrash) as traced:
            cells.run(settings.changed(n_ubatch=7), out / "b", trace=True)
        assert traced.value.node["node"] == "ffn_gate-1"
        np.testing.assert_array_equal(cells.run(settings, out / "c").open().read(LOGITS), before)
    assert sorted(path.name for path in out.iterdir()) == ["a", "c"]


def test_the_model_is_loaded_once_for_cells_that_load_it_alike(text: Text, tmp_path: Path) -> None:
    with Exerciser(text) as cells:
        pids = []
        for changes in ({}, {"n_ubatch": 7}, {"flash_attn": "on"}, {"use_mmap": False}, {"use_mmap": False}):
            cells.run(SETTINGS.changed(**changes), tmp_path / "c")
            assert cells._dialogue is not None
            pids.append(cells._dialogue._worker.process.pid)
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[4]


def test_what_a_window_has_let_go_is_said(make_gguf: MakeGguf, tmp_path: Path) -> None:
    """A sliding-window cache of 256 cells, and a text that goes round in it: its middle cannot be decoded again."""
    model = make_gguf("gemma3", **GEMMA)
    ids = np.random.default_rng(1).integers(0, N_VOCAB, 600)
    settings = SETTINGS.changed(n_ubatch=16, n_batch=16)
    with Exerciser(Text(model, "gemma3", [ids])) as cells:
        run = cells.run(settings, tmp_path / "c", feed=Feed(way="redecoded"))
        assert run.capture is None and run.not_run is not None and "sliding-window cache" in run.not_run
        assert cells.run(settings.changed(swa_full=True), tmp_path / "c", feed=Feed(way="redecoded")).not_run is None
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
