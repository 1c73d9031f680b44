"""Rounds in turn, and ratios within them."""

from __future__ import annotations

from bench.timing import in_turn, median_ratio


def test_every_side_runs_once_a_round_and_another_begins() -> None:
    order: list[str] = []

    def side(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    found = in_turn({"a": lambda: side("a", 1.0), "b": lambda: side("b", 2.0)}, 3)
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(order) == "abbaab"


def test_ratios_are_of_the_same_round() -> None:
    assert median_ratio([1.0, 10.0, 2.0], [2.0, 20.0, 5.0]) == 0.5
