"""The tables of all ops, printed when the suite ends."""

from __future__ import annotations

import pytest

from tests.zoo.table import Table

_TABLES: list[Table] = []
_TOLD: list[tuple[str, list[str]]] = []


@pytest.fixture
def tables() -> list[Table]:
    """Tables that are put here are printed."""
    return _TABLES


@pytest.fixture
def told() -> list[tuple[str, list[str]]]:
    """Titles with lines that are put here are printed."""
    return _TOLD


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    printed = [(title, lines) for title, _, *lines in (table.lines() for table in _TABLES)]
    for title, lines in [*printed, *_TOLD]:
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
