from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffharness.errors import UnsupportedError
from diffharness.machine import available_memory
from diffharness.weights import pread, room
from diffharness.weights.dequant import dequantize

GB = 1_000_000_000


def files(root: Path, **contents: str) -> Path:
    """A root with files, their paths written with `__` for slashes and `_dot_` for dots."""
    for name, text in contents.items():
        file = root / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"


def test_memory_of_this_machine() -> None:
    there = available_memory()
    assert there is None or there > 10_000_000


def test_memory_of_a_machine_and_of_its_control_group(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    root = files(tmp_path, proc__meminfo=MEMINFO)
    assert available_memory(root) == 8_000_000 * 1024
    files(root, sys__fs__cgroup__memory_dot_max="max\n", sys__fs__cgroup__memory_dot_current=f"{9 * GB}\n")
    assert available_memory(root) == 8_000_000 * 1024
    files(root, sys__fs__cgroup__memory_dot_max=f"{4 * GB}\n", sys__fs__cgroup__memory_dot_current=f"{3 * GB}\n")
    assert available_memory(root) == GB
    files(root, sys__fs__cgroup__memory_dot_stat=f"anon {GB}\ninactive_file {2 * GB}\n")
    assert available_memory(root) == 3 * GB
    files(root, sys__fs__cgroup__memory_dot_current=f"{5 * GB}\n")
    assert available_memory(root) == GB


def test_memory_of_an_older_control_group(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes=f"{2 * GB}\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes=f"{GB}\n",
        sys__fs__cgroup__memory__memory_dot_stat=f"total_inactive_file {GB // 2}\n",
    )
    assert available_memory(root) == 1.5 * GB


def test_large_values_are_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: 3 * GB)
    room.require(3 * GB, "a thing")
    with pytest.raises(UnsupportedError, match=r"a thing would take 3\.5 GB of memory, and 3\.0 GB are available"):
        room.require(3 * GB + GB // 2, "a thing")
    stored = np.broadcast_to(np.zeros(1, dtype=np.uint8), GB // 32 * 18)  # of a byte of memory
    blocks = np.lib.stride_tricks.as_strided(stored, (GB // 32 * 18,), (0,))
    with pytest.raises(UnsupportedError, match=r"blk\.0\.ffn_up\.weight .* would take 4\.0 GB") as caught:
        dequantize(blocks, "Q4_0", (1000, GB // 1000), tensor="blk.0.ffn_up.weight")
    assert caught.value.tensor == "blk.0.ffn_up.weight"
    with pytest.raises(UnsupportedError, match=r"would take 4\.0 GB"):
        pread.read_float32(-1, 0, (GB,))


def test_a_system_that_does_not_tell_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: None)
    room.require(1 << 60, "a thing")
