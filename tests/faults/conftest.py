"""The matrix of truth against verdict, printed when the suite ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tests.e2e.conftest import make_pair as make_pair
from tests.e2e.conftest import make_tiny as make_tiny

_COUNTS: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="session")
def count() -> Callable[[str, str], None]:
    """`count(truth, verdict)`: one cell of the matrix."""

    def add(truth: str, verdict: str) -> None:
        _COUNTS[truth, verdict] += 1

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _COUNTS:
        return
    truths, verdicts = (sorted({key[i] for key in _COUNTS}) for i in (0, 1))
    width = max(map(len, verdicts)) + 2
    terminalreporter.section("engine faults: truth by verdict")
    terminalreporter.write_line(" " * 16 + "".join(f"{verdict:>{width}}" for verdict in verdicts))
    for truth in truths:
        row = "".join(f"{_COUNTS[truth, verdict] or '.':>{width}}" for verdict in verdicts)
        terminalreporter.write_line(f"{truth:<16}{row}")
