from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffharness.report._format import clean, cosine, decimals, percent, scientific, size


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (scientific(4.123e-13), "4.1e-13"),
        (scientific(0.0), "0"),
        (scientific(float("inf")), "inf"),
        (scientific(float("nan")), "nan"),
        (scientific(None), "-"),
        (decimals(16.03125), "16.0312"),
        (decimals(float("inf")), "inf"),
        (cosine(0.97123), "0.9712"),
        (cosine(0.99999994), "0.9999"),
        (cosine(float("nan")), "nan"),
        (cosine(1.0), "1.0000"),
        (percent(1.0), "100.00%"),
        (percent(0.99999), "99.99%"),
        (percent(float("nan")), "nan"),
        (size(98362432), "93.8 MiB"),
        (size(12), "12 B"),
        (size(1 << 41), "2.0 TiB"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.text(), st.integers(2, 50))
def test_clean_is_one_printable_line_of_bounded_length(text: str, limit: int) -> None:
    shown = clean(text, limit)
    assert len(shown) <= limit
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in shown)


def test_clean_spells_out_what_it_takes_away() -> None:
    assert clean("a\x1b[31mb\u202ec\nd") == "a\\u{1b}[31mb\\u{202e}c d"
