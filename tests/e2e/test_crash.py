"""An engine that dies is a finding, not the end: the other legs go on with settings that survive."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffharness.records import Finding, RunRecord
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.runs import NATIVE, whole_run
from tests.engine.planted import planted_python


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    return make_pair("llama", "Q4_K")


def run_with(pair: Pair, folder: Path, action: str, *, when: str = "True", limit_s: float = 120) -> RunRecord:
    python = planted_python(folder / "bin", action, node="ffn_up-1", when=when)
    return whole_run(pair, engine=NATIVE.changed(python=python, time_limit_s=limit_s), with_checkpoint=True)


def crashes(record: RunRecord) -> list[Finding]:
    return [finding for finding in record.findings if finding.kind == "engine.crash"]


@pytest.mark.parametrize("action", ["SIGSEGV", "SIGILL", "abort"])
def test_the_default_path_dies(pair: Pair, tmp_path: Path, action: str) -> None:
    """As on machines whose AMX kernels die: repacking off survives, and everything else is still compared."""
    record = run_with(pair, tmp_path, action, when="settings['extra_bufts']")
    assert record.verdict.primary == "engine.crash", record.verdict
    (finding,) = crashes(record)
    assert finding.evidence["survives"] == "extra buffers off"
    assert finding.evidence["node"]["node"] == "ffn_up-1" and finding.evidence["node"]["op"] == "MUL_MAT"
    assert "ffn_up-1" in finding.message and "extra buffers off" in finding.message
    assert ("GGML_ASSERT" in finding.message) == (action == "abort")
    assert record.legs.graph.status == "pass" and record.legs.artifact.status == "pass"
    assert {"native", "strict"} <= set(record.scores.engine)


@pytest.mark.parametrize("everywhere", [True, False])
def test_the_rest_of_a_run_is_done_with_what_survives(pair: Pair, tmp_path: Path, everywhere: bool) -> None:
    """AMX again, with and without the callback: kernels and grid are judged under the settings that survive."""
    python = planted_python(
        tmp_path / "bin", "SIGILL", node="ffn_up-1", when="settings['extra_bufts']", everywhere=everywhere
    )
    record = whole_run(pair, engine=NATIVE.changed(python=python), grid="small")
    assert record.verdict.primary == "engine.crash", record.verdict
    for finding in crashes(record):
        assert finding.evidence["node"]["node"] == "ffn_up-1" and finding.evidence["node"]["op"] == "MUL_MAT"
        assert finding.evidence["survives"] == "extra buffers off"
    legs = record.legs
    assert (legs.graph.status, legs.kernel.status, legs.settings.status) == ("pass", "pass", "pass"), legs
    assert legs.kernel.nodes_replayed > 0 and len(legs.settings.pairs) >= 2


def test_a_hang_is_ended_and_named(pair: Pair, tmp_path: Path) -> None:
    when = "settings['extra_bufts'] and settings['flash_attn'] == 'auto'"
    record = run_with(pair, tmp_path, "hang", when=when, limit_s=8)
    (finding,) = crashes(record)
    assert finding.evidence["kind"] == "hang" and finding.evidence["survives"] == "extra buffers off"
    assert record.legs.graph.status == "pass"


def test_out_of_memory_is_named(pair: Pair, tmp_path: Path) -> None:
    record = run_with(pair, tmp_path, "allocate", when="settings['extra_bufts']")
    (finding,) = crashes(record)
    assert finding.evidence["kind"] == "oom"


def test_no_settings_survive(pair: Pair, tmp_path: Path) -> None:
    record = run_with(pair, tmp_path, "SIGSEGV")
    assert record.verdict.primary == "engine.crash"
    assert all(finding.evidence["survives"] is None for finding in crashes(record))
    assert record.legs.graph.status == "not_run" and record.legs.graph.reason is not None
    assert record.legs.artifact.status == "pass", "the artifact leg needs no engine"


def test_a_refusal_is_no_crash(make_pair: MakePair) -> None:
    """llama.cpp knows no bias on qwen3's output projection: it says so, and nothing is decided."""
    record = whole_run(make_pair("qwen3-biases"))
    assert record.verdict.primary == "inconclusive", record.verdict
    assert not crashes(record) and record.legs.graph.status == "not_run"
    assert "refuse" in record.verdict.summary
