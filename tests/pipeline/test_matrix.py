"""The grid end to end: clean models pass every cell, and one planted fault is that cell's only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffharness.engine.runner import Engine, EngineCrash
from diffharness.errors import SettingsError
from diffharness.pipeline.matrix import MatrixRequest, run_matrix
from diffharness.records.matrix import CellRow, MatrixRecord
from diffharness.settings import load_engine, load_tolerances
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.conftest import make_pair as make_pair
from tests.engine.planted import planted_python
from tests.engine.planted_cells import planted_cells
from tests.oracles.conftest import make_tiny as make_tiny

NATIVE = load_engine("native").changed(threads=1, time_limit_s=60)
FEW = ("again", "callback", "n_ubatch 7", "two calls", "KV copied", "flash attention off", "mmap")


def matrix(pair: Pair, **changes: Any) -> MatrixRecord:
    request: dict[str, Any] = {
        "model": pair.gguf,
        "engine": NATIVE,
        "tolerances": load_tolerances(),
        "fixture": str(pair.fixture),
        "cells": FEW,
    }
    return run_matrix(MatrixRequest(**(request | changes)))


def row(record: MatrixRecord, label: str) -> CellRow:
    return next(cell for cell in record.cells if cell.label == label)


def statuses(record: MatrixRecord) -> dict[str, str]:
    return {cell.label: cell.status for cell in record.cells}


@pytest.mark.parametrize(
    ("case", "type_name"),
    [("llama", "F32"), ("qwen3moe", "Q4_0"), ("gemma4", "Q4_K"), ("gemma2", "Q8_0"), ("mistral-window", "F16")],
)
def test_clean_models_pass_every_cell(make_pair: MakePair, case: str, type_name: str) -> None:
    record = matrix(make_pair(case, type_name), cells=())
    assert record.verdict.primary == "agree", record.verdict.summary
    assert set(statuses(record).values()) <= {"ok", "not run"}
    assert sum(cell.status == "ok" for cell in record.cells) >= 24
    assert all(cell.reason for cell in record.cells if cell.status == "not run")
    for label in ("callback on", "mmap off", "again"):
        found = row(record, label)
        assert found.logits is not None and found.logits.nmse == 0.0
    shift = row(record, "context shift")
    assert shift.against == "cut" and shift.logits is not None and shift.logits.n == 40  # the half after the shift
    assert record.base.control == "strict engine" and record.base.strict is not None


@pytest.mark.parametrize("token", [0, 41, 79])
def test_one_wrong_token_in_one_cell(make_pair: MakePair, tmp_path: Path, token: int) -> None:
    python = planted_cells(tmp_path / "bin", "skew", when="settings['n_ubatch'] == 7", row=token)
    record = matrix(make_pair("llama", "Q4_K"), engine=NATIVE.changed(python=python))
    assert record.verdict.primary == "engine.settings", record.verdict.summary
    assert [label for label, status in statuses(record).items() if status != "ok"] == ["n_ubatch 7"]
    found = row(record, "n_ubatch 7")
    assert (found.first_token, found.first_position, found.tokens_above) == (token, token, 1)
    assert found.reason is not None and "the cell is the one further from the strict engine" in found.reason
    assert record.leg.status == "fail" and f"token {token}" in record.verdict.summary


def test_one_wrong_sequence_of_several(make_pair: MakePair, tmp_path: Path) -> None:
    when = "len(request['scripts'][0][0][1]) > 1 and request.update(skewed='logits@2') is None"
    python = planted_cells(tmp_path / "bin", "skew", when=when, row=30)
    record = matrix(make_pair("llama", "F16"), engine=NATIVE.changed(python=python), cells=("sequences", "two calls"))
    failing = [label for label, status in statuses(record).items() if status == "fail"]
    assert failing == ["several sequences", "several sequences, unified"]
    assert row(record, "several sequences").first_token == 30


@pytest.mark.parametrize(("action", "how"), [("SIGILL", "SIGILL"), ("silent", "exit code 0"), ("hang", "not finish")])
def test_a_cell_that_dies_is_that_cell_only(make_pair: MakePair, tmp_path: Path, action: str, how: str) -> None:
    python = planted_cells(
        tmp_path / "bin", action, when="settings['flash_attn'] == 'off' and settings['type_k'] == 'F16'"
    )
    limit = 8 if action == "hang" else 60
    record = matrix(make_pair("llama"), engine=NATIVE.changed(python=python, time_limit_s=limit))
    assert record.verdict.primary == "engine.crash", record.verdict.summary
    assert statuses(record) == {label: "ok" for label in statuses(record)} | {"flash attention off": "crash"}
    (finding,) = [finding for finding in record.findings if finding.kind == "engine.crash"]
    assert how in finding.message and "ffn_norm-1 (MUL)" in finding.message
    assert "it survives as the base" in finding.message
    assert finding.evidence["survives"] and finding.evidence["node"]["node"] == "ffn_norm-1"
    assert record.leg.status == "pass"


def test_a_base_that_dies_is_replaced_by_the_nearest_survivor(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair("llama")
    capture = Engine.capture

    def dies(self: Engine, model: Any, *arguments: Any, **named: Any) -> Any:
        if Path(model) == pair.gguf and self.settings.extra_bufts:
            raise EngineCrash("the engine died of SIGILL", kind="signal", signal_name="SIGILL", phase="eval")
        return capture(self, model, *arguments, **named)

    monkeypatch.setattr(Engine, "capture", dies)
    record = matrix(pair, cells=("two calls", "extra buffers off"))
    assert record.base.survived == "extra buffers off" and record.base.settings["extra_bufts"] is False
    assert record.verdict.primary == "engine.crash"
    assert statuses(record) == {"extra buffers off": "not run", "two calls": "ok"}


def test_a_default_path_that_dies_leaves_the_grid_under_what_survives(make_pair: MakePair, tmp_path: Path) -> None:
    """As on machines whose AMX kernels die: node and cure are named, and the cells are judged without them."""
    python = planted_python(
        tmp_path / "bin", "SIGILL", node="ffn_up-1", when="settings['extra_bufts']", everywhere=True
    )
    settings = NATIVE.changed(python=python)
    record = matrix(make_pair("llama", "Q4_K"), engine=settings, cells=("two calls", "n_ubatch 7", "callback"))
    (finding,) = [finding for finding in record.findings if finding.kind == "engine.crash"]
    assert record.verdict.primary == "engine.crash"
    assert "ffn_up-1 (MUL_MAT)" in record.verdict.summary and "extra buffers off" in record.verdict.summary
    assert finding.evidence["node"]["op"] == "MUL_MAT" and finding.evidence["survives"] == "extra buffers off"
    assert record.base.survived == "extra buffers off"
    assert statuses(record) == {"callback on": "ok", "n_ubatch 7": "ok", "two calls": "ok"}


def test_overrides_in_one_cell_are_found_and_placed(make_pair: MakePair, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "cells:\n"
        "  sound: {dimension: d, feed: {way: halves}, floor: rounding}\n"
        '  other base: {dimension: d, overrides: ["llama.rope.freq_base=float:900"], floor: rounding}\n'
    )
    record = matrix(make_pair("llama", "Q8_0"), grid=str(grid), cells=())
    assert statuses(record) == {"sound": "ok", "other base": "fail"}
    found = row(record, "other base")
    assert found.first_tap == "blk.0.layer_out"
    assert found.first_token is not None and 1 <= found.first_token < 8  # position 0 is not turned
    assert record.verdict.primary == "engine.settings" and "blk.0.layer_out" in record.verdict.summary


def test_a_wrong_base_does_not_excuse_itself(make_pair: MakePair, tmp_path: Path) -> None:
    """As a broken repack path would: the base itself is far from the strict engine, the cells are near."""
    pair = make_pair("llama", "Q8_0")
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "cells:\n  sound: {dimension: d, overrides: ['llama.rope.freq_base=float:5000'], floor: rounding}\n"
    )
    capture = Engine.capture

    def base_with_another_rope(self: Any, model: Any, *arguments: Any, **named: Any) -> Any:
        if Path(model) == pair.gguf:
            named["overrides"] = ["llama.rope.freq_base=float:900"]
        return capture(self, model, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "capture", base_with_another_rope)
        record = matrix(pair, grid=str(grid), cells=())
    found = row(record, "sound")
    assert found.status == "fail" and found.reason is not None and "the base is the one" in found.reason


def test_lossy_caches_have_a_control(make_pair: MakePair) -> None:
    record = matrix(make_pair("llama", "F16"), cells=("KV Q8_0", "KV Q4_0", "KV BF16"))
    assert set(statuses(record).values()) == {"ok"}
    losses = [row(record, f"KV {name}") for name in ("BF16", "Q8_0", "Q4_0")]
    numbers = [(found.logits.nmse, found.control) for found in losses if found.logits is not None and found.control]
    assert [nmse for nmse, _ in numbers] == sorted(nmse for nmse, _ in numbers)
    assert all(1 / 4 < nmse / control < 4 for nmse, control in numbers)


def test_a_lossy_cache_that_loses_too_much_fails(make_pair: MakePair, tmp_path: Path) -> None:
    """A cell that says Q8_0 and whose worker keeps its cache in Q4_0."""
    python = planted_cells(
        tmp_path / "bin", "skew",
        when="settings['type_k'] == 'Q8_0' and settings.update(type_k='Q4_0', type_v='Q4_0') is not None", row=-1,
    )  # fmt: skip
    script = (tmp_path / "bin" / "sitecustomize.py").read_text()
    swapped = script.replace(
        "        return perform(session, model, request)",
        "        is_meant()\n        return perform(session, model, request)",
    )
    (tmp_path / "bin" / "sitecustomize.py").write_text(swapped)
    record = matrix(make_pair("llama", "F16"), engine=NATIVE.changed(python=python), cells=("KV Q8_0", "KV BF16"))
    assert statuses(record) == {"KV BF16": "ok", "KV Q8_0": "fail"}


def test_without_a_cell_there_is_nothing_to_do(make_pair: MakePair) -> None:
    with pytest.raises(SettingsError, match="no cell's label"):
        matrix(make_pair("llama"), cells=("nothing like this",))
    with pytest.raises(SettingsError, match="no grid is called"):
        matrix(make_pair("llama"), grid="none")


def test_settings_of_the_base_alone_are_no_agreement(make_pair: MakePair) -> None:
    record = matrix(make_pair("llama"), cells=("n_ubatch 512",), grid="full")
    assert statuses(record) == {"n_ubatch 512": "not run"} and record.verdict.primary == "inconclusive"


def test_a_context_shift_that_scales_keys_twice_is_found(make_pair: MakePair) -> None:
    """llama.cpp turns shifted keys with YaRN's own rope, and so multiplies them by YaRN's magnitude once more.

    With a magnitude of 1 (the file's attention factor times 0.1 ln 4 + 1) the same cells pass.
    """
    shifts = ("context shift", "moved")
    pair, cells = make_pair("llama-yarn"), ("context shift",)
    record = matrix(pair, cells=cells)
    assert statuses(record) == dict.fromkeys(shifts, "fail") and record.verdict.primary == "engine.settings"
    assert row(record, "moved").first_token == 40 and row(record, "moved").first_tap == "blk.0.layer_out"
    plain = matrix(pair, cells=cells, overrides=("llama.rope.scaling.attn_factor=float:0.87824886",))
    assert statuses(plain) == dict.fromkeys(shifts, "ok")


def test_models_of_absolute_positions_are_not_shifted(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that count themselves make the whole text come out otherwise when it begins further from 0."""
    from diffharness.pipeline.cell_runs import CellRuns

    base_logits = CellRuns.base_logits

    def as_if_absolute(self: CellRuns, feed: Any) -> Any:
        found = base_logits(self, feed)
        return found + 1 if feed is not None and feed.way in ("offset", "halves", "cut") else found

    monkeypatch.setattr(CellRuns, "base_logits", as_if_absolute)
    record = matrix(make_pair("llama"), cells=("context shift",))
    assert set(statuses(record).values()) == {"not run"}
    assert all("absolute positions" in (cell.reason or "") for cell in record.cells)


@pytest.mark.parametrize("with_reference", [True, False])
def test_without_a_strict_engine(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, with_reference: bool) -> None:
    """The reference stands in for it; without either, only what changes nothing of the arithmetic is judged."""
    pair = make_pair("llama", "Q4_K")
    capture = Engine.capture

    def refuses_f32(self: Engine, model: Any, *arguments: Any, **named: Any) -> Any:
        if Path(model) != pair.gguf:
            raise EngineCrash("no", kind="refused")
        return capture(self, model, *arguments, **named)

    monkeypatch.setattr(Engine, "capture", refuses_f32)
    if not with_reference:
        monkeypatch.setattr("diffharness.pipeline.matrix._reference", lambda work: None)
    record = matrix(pair, cells=("mmap", "n_ubatch 7", "context shift"))
    shifts = ("context shift", "moved")
    expected = "ok" if with_reference else "not judged"
    assert statuses(record) == {"mmap off": "ok", "n_ubatch 7": expected} | dict.fromkeys(shifts, expected)
    assert record.base.control == ("reference" if with_reference else "none")
    assert record.verdict.primary == "agree" and record.leg.reason is not None
