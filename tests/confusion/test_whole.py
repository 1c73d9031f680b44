"""Every case, by both judges (`make confusion` prints the matrix of them)."""

from __future__ import annotations

import pytest

from bench.confusion.cases import CASES, Case
from bench.confusion.judging import Judge

pytestmark = [pytest.mark.confusion, pytest.mark.slow]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(judge: Judge, case: Case) -> None:
    judged = judge.judge(case)
    assert not judged.faults, (judged.faults, judged.summary)
