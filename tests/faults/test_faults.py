"""Engines that are wrong in one way, and sound ones under many settings: each gets the verdict that it deserves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diffharness.records import RunRecord
from diffharness.taps import split
from tests.e2e.conftest import MakePair
from tests.e2e.runs import NATIVE, whole_run
from tests.faults.build import clean_build, faulty_build
from tests.faults.cases import CLEAN, FAULTS, Clean, Fault

pytestmark = [pytest.mark.faults, pytest.mark.slow]

Count = Callable[[str, str], None]

WHOLE = {"grid": "small", "noise": True, "explain": True, "kernel_tokens": 64}


def judged(fault: Fault, make_pair: MakePair) -> RunRecord:
    changes = dict(fault.settings)
    if fault.patch is not None:
        changes["lib_dir"] = faulty_build(fault.patch)
    overrides = (fault.override,) if fault.override else ()
    pair = make_pair(fault.case, fault.type)
    return whole_run(pair, engine=NATIVE.changed(threads=2, **changes), overrides=overrides, **WHOLE)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named(fault: Fault, make_pair: MakePair, count: Count) -> None:
    record = judged(fault, make_pair)
    count(fault.kind, record.verdict.primary)
    said = [finding.message for finding in record.findings]
    assert record.verdict.primary == fault.kind, said
    if fault.kind == "engine.graph":
        first = record.first_divergence
        assert first is not None and split(first.tap)[1] == fault.where, said
        assert "engine.kernel" not in record.verdict.all, said
        return
    finding = next(finding for finding in record.findings if finding.kind == fault.kind)
    assert finding.evidence["op"] == fault.where, said
    assert "engine.graph" not in record.verdict.all, said
    assert fault.patch is not None
    if fault.patch.path is not None:
        assert finding.evidence["paths"] == [fault.patch.path], said
    if fault.patch.cure is not None:
        assert fault.patch.cure in [*finding.evidence["cures"], *finding.evidence["avoids"]], said


@pytest.mark.parametrize("cell", CLEAN, ids=lambda cell: cell.name)
def test_a_clean_cell_is_not_accused(cell: Clean, make_pair: MakePair, count: Count) -> None:
    record = whole_run(make_pair(cell.case, cell.type), engine=NATIVE.changed(**cell.settings), **WHOLE)
    count("clean", record.verdict.primary)
    assert record.verdict.primary == "agree", [finding.message for finding in record.findings]


def test_the_source_as_it_is_agrees(make_pair: MakePair, count: Count) -> None:
    """What the faults are planted in has none."""
    record = whole_run(make_pair("llama", "Q4_K"), engine=NATIVE.changed(threads=2, lib_dir=clean_build()), **WHOLE)
    count("clean", record.verdict.primary)
    assert record.verdict.primary == "agree", [finding.message for finding in record.findings]


def test_there_are_enough_of_both() -> None:
    assert len(FAULTS) >= 60 and len(CLEAN) >= 40
    assert sum(fault.patch is not None for fault in FAULTS) >= 12
