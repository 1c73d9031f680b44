"""Each in a process of its own: the settings are the process's, and the test runner is not to have them."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")

FILLED = """
import os, resource, sys, threading
import numpy as np
from diffharness import allocator

def fill():
    np.empty(30 << 20, np.float32).fill(1)

def faults(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def in_thread():
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
"""


def run(code: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", FILLED + code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@glibc
def test_what_was_freed_is_there_for_the_next_in_any_thread() -> None:
    kept, again, elsewhere, held, left = run("""
kept = allocator.keep_freed_memory()
np.ones(10)
fill()
print(int(kept), faults(fill), faults(in_thread))
held = resident()
allocator.give_back_memory()
print(held, resident())
""")
    assert kept
    assert again < 20 and elsewhere < 50  # 120 MiB have 30,000 pages, or 60 large ones
    assert held - left > 100 << 20


@glibc
def test_a_process_that_does_not_ask_is_left_alone() -> None:
    before, after = run("""
before = resident()
fill()
print(before, resident())
""")
    assert after - before < 20 << 20


def test_another_c_library_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffharness import allocator

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory() is False
    allocator.give_back_memory()
