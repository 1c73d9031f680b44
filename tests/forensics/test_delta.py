"""Delta debugging: what is left is enough, 1-minimal, and found within the budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffharness.forensics.delta import smallest


def needs(*wanted: int) -> Callable[[frozenset[int]], bool]:
    return lambda units: set(wanted) <= units


@pytest.mark.parametrize("wanted", [(), (3,), (0, 9), (2, 3, 4), tuple(range(10))])
def test_exactly_what_is_needed(wanted: tuple[int, ...]) -> None:
    found = smallest(list(range(10)), needs(*wanted))
    assert found.units == list(wanted) and found.minimal and found.finest


@given(st.sets(st.integers(0, 30)), st.integers(1, 31))
def test_any_needed_set(wanted: set[int], n: int) -> None:
    wanted &= set(range(n))
    tested: list[frozenset[int]] = []

    def enough(units: frozenset[int]) -> bool:
        assert units not in tested, "each set is tested once"
        tested.append(units)
        return wanted <= units

    found = smallest(list(range(n)), enough)
    assert set(found.units) == wanted and found.minimal and found.tests == len(tested)


def test_either_of_two_will_do_and_the_first_is_left_out_first() -> None:
    found = smallest([0, 1, 2, 3], lambda units: 0 in units or 3 in units)
    assert found.units == [3] and found.minimal


def test_a_set_that_is_not_monotone_is_1_minimal_all_the_same() -> None:
    """Without 1 it needs 2 as well: leaving out 2 first would do, but leaving out 1 does too."""

    def enough(units: frozenset[int]) -> bool:
        return 0 in units and (1 in units or {2, 3} <= units)

    found = smallest([0, 1, 2, 3], enough)
    assert enough(frozenset(found.units)) and found.minimal
    assert not any(enough(frozenset(found.units) - {unit}) for unit in found.units)


def halves(unit: tuple[int, ...]) -> list[tuple[int, ...]]:
    middle = len(unit) // 2
    return [unit[:middle], unit[middle:]] if middle else [unit]


def flat(units: frozenset[tuple[int, ...]]) -> set[int]:
    return {number for unit in units for number in unit}


def test_units_are_cut_until_nothing_more_can_be_left_out() -> None:
    units = [tuple(range(0, 12)), tuple(range(12, 24)), tuple(range(24, 36))]
    found = smallest(units, lambda units: {13, 14, 30} <= flat(units), halves)
    assert flat(frozenset(found.units)) == {13, 14, 30} and found.finest and found.minimal


@pytest.mark.parametrize("budget", range(0, 40))
def test_within_any_budget_what_is_left_is_enough(budget: int) -> None:
    units = [tuple(range(0, 12)), tuple(range(12, 24)), tuple(range(24, 36))]
    spent = 0

    def enough(units: frozenset[tuple[int, ...]]) -> bool | None:
        nonlocal spent
        if spent == budget:
            return None
        spent += 1
        return {13, 14, 30} <= flat(units)

    found = smallest(units, enough, halves)
    assert {13, 14, 30} <= flat(frozenset(found.units)) and found.tests == spent <= budget
    if budget < 4:  # 3 coarse units: one is left out, the others once each
        assert not found.minimal and not found.finest
    needed = [{13, 14, 30} - flat(frozenset(found.units) - {unit}) for unit in found.units]
    assert all(needed) or not found.minimal, "what is called minimal is"
    assert found.finest is (budget >= 24)


def test_nothing_is_cut_where_nothing_can_be() -> None:
    found = smallest([1], needs(1))
    assert found.units == [1] and found.tests == 1 and found.finest
    assert smallest([], needs()).units == []
