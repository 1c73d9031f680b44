"""Lists of names and counts in messages. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """`a, b and 3 more`: the first `most` names, and how many more there are."""
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """`1 tensor`, `3 tensors`; `plural` where it is not the noun and an s."""
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def are(n: int) -> str:
    """`is` of one, `are` of any other number."""
    return "is" if n == 1 else "are"
