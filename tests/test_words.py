"""Lists of names in messages."""

from __future__ import annotations

from diffharness.words import are, counted, listed


def test_the_first_names_and_how_many_more() -> None:
    assert listed([]) == "" and listed(["a"]) == "a"
    assert listed(["a", "b", "c"], 3) == "a, b, c"
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"
    assert listed(["a", "b", "c", "d"], 2, "; ") == "a; b and 2 more"


def test_one_is_no_plural() -> None:
    assert [counted(n, "tensor") for n in (0, 1, 2)] == ["0 tensors", "1 tensor", "2 tensors"]
    assert [counted(n, "matrix", "matrices") for n in (1, 3)] == ["1 matrix", "3 matrices"]
    assert [are(n) for n in (0, 1, 2)] == ["are", "is", "are"]
