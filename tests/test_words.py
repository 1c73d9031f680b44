"""Lists of names in messages."""

from __future__ import annotations

from diffharness.words import listed


def test_the_first_names_and_how_many_more() -> None:
    assert listed([]) == "" and listed(["a"]) == "a"
    assert listed(["a", "b", "c"], 3) == "a, b, c"
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"
    assert listed(["a", "b", "c", "d"], 2, "; ") == "a; b and 2 more"
