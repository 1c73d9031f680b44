"""Lists of names in messages. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """`a, b and 3 more`: the first `most` names, and how many more there are."""
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
