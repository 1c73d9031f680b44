"""The tables of all ops, printed when the suite ends."""

from __future__ import annotations

import pytest

from tests.zoo.table import Table

_TABLES: list[Table] = []


@pytest.fixture
def tables() -> list[Table]:
    """Tables that are put here are printed."""
    return _TABLES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for table in _TABLES:
        title, _, *lines = table.lines()
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
