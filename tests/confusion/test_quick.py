"""A few cases of each kind, by `inspect`; of some also by the forwards of `run`."""

from __future__ import annotations

import pytest

from bench.confusion.cases import CASES, EMBEDDED, Case
from bench.confusion.judging import Judge

QUICK = [case for case in CASES if case.quick]
BY_RUN = [case for case in QUICK if case.base.model != EMBEDDED]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_inspect(judge: Judge, case: Case) -> None:
    judged = judge.judge(case, with_run=False)
    assert not judged.faults and judged.excused is None, (judged.faults, judged.summary)


@pytest.mark.parametrize("case", BY_RUN, ids=lambda case: case.name)
def test_run(judge: Judge, case: Case) -> None:
    judged = judge.judge(case, with_run=True)
    assert not judged.faults, judged.faults
