"""Peaks of a process and of the one that it starts, told apart."""

from __future__ import annotations

import sys
from pathlib import Path

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
    assert 100 * MIB < found.held <= found.own < 150 * MIB
    assert 200 * MIB < found.workers < 250 * MIB


def test_mapped_files_are_told_from_memory(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(100 * MIB))
    words = f"""
import mmap, time
with open({str(file)!r}, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[::4096])
time.sleep(0.5)
"""
    found = footprint([sys.executable, "-c", words])
    assert found.own > 100 * MIB and found.held < 50 * MIB


def test_without_workers() -> None:
    found = footprint([sys.executable, "-c", _HOLD.format(1)])
    assert found.workers == 0 and found.own > MIB


def test_another_end_is_an_error_with_its_words() -> None:
    with pytest.raises(SystemExit, match=r"ended with 1: (.|\n)*sad"):
        footprint([sys.executable, "-c", "raise SystemExit('sad')"])
