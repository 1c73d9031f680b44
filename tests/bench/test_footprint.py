"""Peaks of a process and of the one that it starts, told apart."""

from __future__ import annotations

import sys

import pytest

from bench.footprint import footprint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 1 << 20
_HOLD = "held = b'x' * ({} << 20); import time; time.sleep(0.5)"
_PARENT = f"""
import subprocess, sys
held = b'x' * (100 << 20)
subprocess.run([sys.executable, "-c", {_HOLD.format(200)!r}], check=True)
sys.exit(3)
"""


def test_a_worker_counts_by_itself() -> None:
    found = footprint([sys.executable, "-c", _PARENT], good=(0, 3))
    assert found.code == 3
    assert 100 * MIB < found.own < 150 * MIB
    assert 200 * MIB < found.workers < 250 * MIB


def test_without_workers() -> None:
    found = footprint([sys.executable, "-c", _HOLD.format(1)])
    assert found.workers == 0 and found.own > MIB


def test_another_end_is_an_error_with_its_words() -> None:
    with pytest.raises(SystemExit, match=r"ended with 1: (.|\n)*sad"):
        footprint([sys.executable, "-c", "raise SystemExit('sad')"])
