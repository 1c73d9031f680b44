"""The C library's allocator, told to keep what is freed for what is asked for next.

A forward takes and frees blocks of tens and hundreds of megabytes all the time. Left to itself glibc fetches each
of them from the system and returns it afterwards, and every page is found, zeroed and mapped again: at the widths
of a 12B model and 256 tokens that takes a quarter to a half as long as a layer's arithmetic, longer where a virtual
machine has to ask its host. Kept memory is given back before an engine starts, which needs it for itself.

With another C library nothing happens. ctypes only.
"""

from __future__ import annotations

import ctypes
from typing import Any

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_LARGEST = 1 << 30  # bytes; blocks from here on are still fetched and returned each by itself
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """From now on, for the whole process; whether the C library does so. To be called before threads are started.

    All threads share one arena, since those that further ones would get hold no large blocks.
    """
    mallopt = _function("mallopt", ctypes.c_int, ctypes.c_int)
    if mallopt is None:
        return False
    large = mallopt(_MMAP_THRESHOLD, _LARGEST) or mallopt(_MMAP_MAX, 0)  # an older glibc takes only the latter
    return bool(large and mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_ARENA_MAX, 1))


def give_back_memory() -> None:
    """Return to the system what is free now."""
    trim = _function("malloc_trim", ctypes.c_size_t)
    if trim is not None:
        trim(0)


def _function(name: str, *arguments: Any) -> Any:
    """A function of the C library that returns an int; None if it has none of that name."""
    found = getattr(ctypes.CDLL(None), name, None)
    if found is not None:
        found.restype, found.argtypes = ctypes.c_int, list(arguments)
    return found
