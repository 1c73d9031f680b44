"""Large values are refused before memory is taken for them, not by the system when it has run out.

Memory that was promised is found missing only when it is written to, and then some process is ended without a word.
"""

from __future__ import annotations

from diffharness.errors import UnsupportedError
from diffharness.machine import available_memory

_LARGE = 1 << 28  # bytes; what is smaller is taken without asking the system


def require(n_bytes: int, what: str, *, tensor: str | None = None) -> None:
    """Raises UnsupportedError if `what` (the message's subject) would take more memory than there is."""
    if n_bytes < _LARGE:
        return
    there = available_memory()
    if there is not None and n_bytes > there:
        raise UnsupportedError(
            f"{what} would take {gigabytes(n_bytes)} of memory, and {gigabytes(there)} are available",
            hint="end other programs, or use a machine with more memory",
            tensor=tensor,
        )


def gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
