"""Every case, by both judges (`make confusion` prints the matrix of them)."""

from __future__ import annotations

import pytest

from bench.confusion.cases import CASES
from bench.confusion.judging import Judge
from bench.confusion.matrix import line

pytestmark = [pytest.mark.confusion, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("truth", ["clean", "weights", "metadata", "file", "lineage"])
def test_cases(judge: Judge, truth: str) -> None:
    judged = [judge.judge(case) for case in CASES if case.truth == truth]
    wrong = [f"{line(j)}: {'; '.join(j.faults)}" for j in judged if j.faults]
    assert judged and not wrong, wrong
