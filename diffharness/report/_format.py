"""Numbers in the field's style, and strings from files made harmless. Pure functions."""

from __future__ import annotations

import math
import unicodedata

NONE = "-"


def scientific(value: float | None) -> str:
    """`4.1e-13`: NMSE, KL, floors."""
    if value is None:
        return NONE
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.1e}"


def decimals(value: float | None, places: int = 4) -> str:
    """`16.0312`: perplexity, cosine."""
    return NONE if value is None else f"{value:.{places}f}"


def cosine(value: float | None) -> str:
    """Four decimals, never rounded up: `1.0000` is exactly 1."""
    if value is None or not math.isfinite(value):
        return NONE if value is None else f"{value:g}"
    return f"{math.floor(value * 10000) / 10000:.4f}"


def percent(share: float | None) -> str:
    """`99.61%` of a share from 0 to 1; never 100% unless it is all."""
    if share is None or not math.isfinite(share):
        return NONE if share is None else f"{share:g}"
    return f"{math.floor(share * 10000) / 100:.2f}%"


def size(n_bytes: int | None) -> str:
    """`92.1 MiB`."""
    if n_bytes is None:
        return NONE
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def clean(text: object, limit: int = 400) -> str:
    """One line of printable text: control characters, terminal escapes and direction marks are spelled out."""
    shown = "".join(_visible(char) for char in str(text)[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _visible(char: str) -> str:
    if char in "\n\r\t":
        return " "
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"\\u{{{ord(char):x}}}"
    return char
