"""The binary search by itself: every place of the change, every place that cannot be looked at."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffharness.bisection import bisect


def test_the_first_change_is_found_wherever_it_is() -> None:
    for n in range(2, 40):
        for change in range(1, n):
            looked: list[int] = []

            def probe(at: int, change: int = change, looked: list[int] = looked) -> bool:
                looked.append(at)
                return at >= change

            found = bisect(n, probe)
            assert (found.last_same, found.first_changed, found.candidates) == (change - 1, change, [change])
            assert looked[0] == n - 1, "the ends first"
            assert len(looked) == len(set(looked)) <= math.ceil(math.log2(n)) + 1


def test_no_change() -> None:
    looked: list[int] = []
    found = bisect(9, lambda at: bool(looked.append(at)))
    assert (found.last_same, found.first_changed, found.candidates) == (8, None, []) and looked == [8]


@given(st.integers(2, 30), st.data())
def test_skips_widen_the_answer_and_never_make_it_wrong(n: int, data: st.DataObject) -> None:
    change = data.draw(st.integers(1, n))  # n: none
    dead = data.draw(st.sets(st.integers(1, n - 1)))
    found = bisect(n, lambda at: None if at in dead else at >= change)
    alive = [at for at in range(n) if at not in dead]
    changed = [at for at in alive if at >= change]
    if not changed:
        assert found.first_changed is None and found.last_same == alive[-1]
        return
    assert found.first_changed == changed[0]
    assert found.last_same == max(at for at in alive if at < change)
    assert change in found.candidates
    assert set(found.candidates[:-1]) <= dead and set(found.skipped) <= dead


def test_a_list_of_one_has_nothing_to_search() -> None:
    with pytest.raises(ValueError, match="nothing to search"):
        bisect(1, lambda at: True)
