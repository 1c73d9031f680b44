from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffharness.errors import BadInputError
from diffharness.layers import buckets, describe_layers, describe_positions, parse_layers, period, ranges

GEMMA = ["sliding"] * 5 + ["global"]


@pytest.mark.parametrize(
    ("layers", "kinds", "says"),
    [
        ([], GEMMA * 2, "no layer"),
        (range(12), GEMMA * 2, "all layers"),
        ([0], ["global"], "the only layer"),
        ([5, 11], GEMMA * 2, "only global layers (5, 11)"),
        ([0, 1, 2, 3, 4, 6, 7, 8, 9, 10], GEMMA * 2, "only sliding layers (0-4, 6-10)"),
        ([3], GEMMA * 2, "only layer 3 (sliding)"),
        ([2, 3, 4, 5, 8, 9, 10, 11], GEMMA * 2, "only layers with number mod 6 in {2, 3, 4, 5} (2-5, 8-11)"),
        ([3, 7], GEMMA * 2, "only sliding layers, of them 3, 7"),
        ([3], ["global"] * 12, "only layer 3"),
        ([3, 4], ["global"] * 12, "only layers 3, 4"),
        ([1, 3, 5], ["global"] * 6, "only layers with number mod 2 in {1} (1, 3, 5)"),
    ],
)
def test_describe_layers(layers, kinds, says) -> None:
    assert describe_layers(list(layers), kinds) == says


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (0, "from the first position on"),
        (1, "at every position but the first"),
        (64, "only positions >= 64 (the window)"),
        (66, "only positions >= 66 (past the window, 64)"),
        (128, "only positions >= 128 (n_ubatch)"),
        (100, "only positions >= 100 of 512"),
        (63, "only positions >= 63 of 512"),
    ],
)
def test_describe_positions(first: int, says: str) -> None:
    assert describe_positions(first, 512, {"the window": 64, "n_ubatch": 128}) == says


@given(st.integers(1, 5000), st.lists(st.integers(0, 6000), max_size=3))
def test_buckets_cover_every_position_once(length: int, landmarks: list[int]) -> None:
    parts = buckets(length, landmarks)
    assert [p for start, stop in parts for p in range(start, stop)] == list(range(length))
    for at in landmarks:
        assert not any(start < at < stop for start, stop in parts)


@given(st.sets(st.integers(0, 30), min_size=1))
def test_ranges_name_every_number(numbers: set[int]) -> None:
    assert parse_layers(ranges(numbers)) == parse_layers(ranges(numbers), 31) == numbers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-3", "0-", "1-99999"])
def test_layers_misspelled(text: str) -> None:
    with pytest.raises(BadInputError, match="expected layers, such as"):
        parse_layers(text)


def test_layers_that_a_model_lacks() -> None:
    with pytest.raises(BadInputError, match="expected layers from 0 to 5"):
        parse_layers("0-6", 6)


def test_period_needs_to_be_seen_twice() -> None:
    assert period([0, 6], 12) == (6, [0])
    assert period([0, 7], 12) is None
