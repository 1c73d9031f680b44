"""The kernel leg on whole models: clean ones agree, a kernel that errs is accused with its node and its cure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffharness.errors import UnsupportedError
from diffharness.fixture import from_ids, save_fixture
from diffharness.pipeline import replaying
from diffharness.pipeline.replaying import ONE_BY_ONE, Recording, ReplayRequest, replay_leg, replay_model
from diffharness.pipeline.request import RunRequest
from diffharness.records.base import parse
from diffharness.records.replay import ReplayRecord
from diffharness.replay.driver import Outcome
from diffharness.report.document import to_text
from diffharness.report.replay import document
from diffharness.settings import EngineSettings, data_dir, load_tolerances
from diffharness.verdict import exit_code
from diffharness.weights.gguf_file import open_gguf
from tests.engine.conftest import ids as ids
from tests.engine.conftest import llama_gguf as llama_gguf
from tests.engine.conftest import make_gguf as make_gguf
from tests.engine.planted import planted_python

QUICK = EngineSettings(threads=2, time_limit_s=120)


def replayed(model: Path, settings: EngineSettings = QUICK, **more: Any) -> ReplayRecord:
    run = RunRequest(model=model, engine=settings, tolerances=load_tolerances())
    record = replay_model(ReplayRequest(run, **({"n_batch": 20} | more)))
    assert parse(ReplayRecord, record.to_json(), "here") == record
    assert max(map(len, to_text(document(record)).splitlines())) <= 100
    return record


def planted(folder: Path, node: str, when: str = "True", action: str = "alter") -> EngineSettings:
    return QUICK.changed(python=planted_python(folder / "bin", action, node=node, when=when))


def test_a_clean_model_agrees(llama_gguf: Path) -> None:
    record = replayed(llama_gguf)
    leg = record.kernel
    assert (record.verdict.primary, exit_code(record.verdict), leg.status) == ("agree", 0, "pass")
    assert leg.nodes_replayed == leg.nodes_total > 100 and not leg.without and not leg.changed
    assert (leg.n_batch, leg.n_single, record.findings) == (20, 2, [])
    assert {row.path for row in leg.ops} == {"batch", "single"}
    assert "nodes give what their inputs call for" in record.verdict.summary
    assert record.subject.fixture is not None and "seed" in record.subject.fixture.name


@pytest.mark.parametrize("name", ["tiny-gemma4-Q4_K_M.gguf"])
def test_the_embedded_model_agrees(name: str) -> None:
    folder = data_dir("fixtures") / "tiny-gemma4"
    run = RunRequest(
        model=folder / name, engine=QUICK, tolerances=load_tolerances(), fixture=str(folder / "heldout.json")
    )
    record = replay_model(ReplayRequest(run, n_batch=24, n_single=1))
    assert (record.verdict.primary, record.kernel.without) == ("agree", []), record.verdict.summary


@pytest.mark.parametrize(
    ("node", "op"),
    [("Qcur-1", "MUL_MAT"), ("ffn_swiglu-0", "SWIGLU"), ("norm-1", "RMS_NORM")],
)
def test_a_kernel_that_errs_is_accused(llama_gguf: Path, tmp_path: Path, node: str, op: str) -> None:
    """Its value is altered in the engine itself, so that all later nodes have wrong inputs and are right for them."""
    record = replayed(llama_gguf, planted(tmp_path, node))
    assert (record.verdict.primary, exit_code(record.verdict)) == ("engine.kernel", 1)
    first = record.kernel.failing[0]
    assert first.node == node and first.layer == int(node[-1]) and first.worst_row == 0
    assert {row.node for row in record.kernel.failing} == {node}, "another node is accused than the one that errs"
    assert op in record.verdict.summary and node in record.verdict.summary
    evidence = record.findings[0].evidence
    assert evidence["cures"] == [] and "the same settings again" in evidence["persists"]


@pytest.mark.parametrize(
    ("when", "cure"),
    [
        ("settings['extra_bufts']", "extra buffers off"),
        ("settings['threads'] > 1", "one thread"),
        ("settings['flash_attn'] != 'off'", "flash attention off"),
        ("n_tokens > 1", ONE_BY_ONE),
    ],
)
def test_the_switch_that_cures_it_is_named(llama_gguf: Path, tmp_path: Path, when: str, cure: str) -> None:
    record = replayed(llama_gguf, planted(tmp_path, "ffn_up-1", when))
    assert record.findings[0].evidence["cures"] == [cure], record.findings[0].evidence
    assert record.verdict.summary.rstrip(".").endswith(f"right with {cure}")


def test_a_fault_of_single_tokens_only(llama_gguf: Path, tmp_path: Path) -> None:
    record = replayed(llama_gguf, planted(tmp_path, "ffn_up-1", "n_tokens == 1"))
    assert {row.path for row in record.kernel.failing} == {"single"}
    assert "for a single token, not for a batch" in record.verdict.summary


def test_a_node_that_is_wrong_only_sometimes(llama_gguf: Path, tmp_path: Path) -> None:
    mark = tmp_path / "been"
    when = f"n_tokens > 1 and not __import__('os').path.exists({str(mark)!r}) and open({str(mark)!r}, 'w')"
    record = replayed(llama_gguf, planted(tmp_path, "ffn_up-1", when))
    assert "the same settings again" in record.findings[0].evidence["cures"]


@pytest.mark.parametrize(("cores", "engine", "left"), [(2, 2, 1), (8, 2, 6), (16, 4, 7), (2, 8, 1)])
def test_torch_takes_the_cores_that_the_engine_leaves(
    llama_gguf: Path, monkeypatch: pytest.MonkeyPatch, cores: int, engine: int, left: int
) -> None:
    seen: list[int] = []

    def replay(*_: object) -> Outcome:
        seen.append(torch.get_num_threads())
        return Outcome()

    monkeypatch.setattr(replaying, "usable_cores", lambda: cores)
    monkeypatch.setattr(replaying, "replay", replay)
    before = torch.get_num_threads()
    torch.set_num_threads(7)  # no more than these, whatever is left
    try:
        with open_gguf(llama_gguf) as artifact:
            Recording(artifact, [1, 2, 3, 4], QUICK.changed(threads=engine)).replayed()
        assert (seen, torch.get_num_threads()) == ([left], 7)
    finally:
        torch.set_num_threads(before)


def test_an_engine_that_dies(llama_gguf: Path, tmp_path: Path) -> None:
    record = replayed(llama_gguf, planted(tmp_path, "ffn_up-1", "settings['extra_bufts']", "SIGILL"))
    assert (record.verdict.primary, exit_code(record.verdict)) == ("engine.crash", 1)
    assert "survives with extra buffers off" in record.verdict.summary and "ffn_up-1" in record.verdict.summary
    assert record.kernel.status == "pass" and "replayed with extra buffers off" in (record.kernel.reason or "")
    hopeless = replayed(llama_gguf, planted(tmp_path / "2", "ffn_up-1", action="SIGILL"))
    assert hopeless.verdict.primary == "engine.crash" and hopeless.kernel.status == "not_run"


def test_the_leg_of_a_dead_engine_did_not_run(llama_gguf: Path, tmp_path: Path, ids: list[int]) -> None:
    settings = planted(tmp_path, "ffn_up-1", action="abort")
    with open_gguf(llama_gguf) as artifact:
        found = replay_leg(Recording(artifact, ids, settings, n_batch=8), load_tolerances())
    assert found.leg.status == "not_run" and "died" in (found.leg.reason or "")
    assert [finding.kind for finding in found.findings] == ["engine.crash"]


def test_what_the_engine_refuses_is_inconclusive(llama_gguf: Path, tmp_path: Path) -> None:
    settings = planted(tmp_path, "ffn_up-1", action="memory")
    record = replayed(llama_gguf, settings)
    assert record.kernel.status == "not_run" and exit_code(record.verdict) in (1, 125)
    nowhere = replayed(llama_gguf, QUICK.changed(python=tmp_path / "none"))
    assert (nowhere.verdict.primary, exit_code(nowhere.verdict)) == ("inconclusive", 125)
    assert "cannot start" in (nowhere.kernel.reason or "")


def test_unfit_input(llama_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no such file"):
        replayed(tmp_path / "none.gguf")
    (tmp_path / "short.gguf").write_bytes(llama_gguf.read_bytes()[:700])
    record = replayed(tmp_path / "short.gguf")
    assert (record.verdict.primary, exit_code(record.verdict, record.findings)) == ("artifact.file", 2)


def test_a_fixture_of_ids(llama_gguf: Path, tmp_path: Path) -> None:
    fixture = tmp_path / "ids.json"
    save_fixture(from_ids([1, 2, 3, 4, 5, 6], name="six"), fixture)
    run = RunRequest(model=llama_gguf, engine=QUICK, tolerances=load_tolerances(), fixture=str(fixture))
    record = replay_model(ReplayRequest(run))
    assert (record.kernel.n_batch, record.kernel.n_single) == (4, 2) and record.verdict.primary == "agree"
    one = replace(run, overrides=("llama.rope.freq_base=float:500000",))
    assert replay_model(ReplayRequest(one)).verdict.primary == "agree"  # a wrong graph of right kernels
