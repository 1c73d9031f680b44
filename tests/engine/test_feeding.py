"""Scripts: every token is decoded where it should be, once for the record, by every way."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffharness.engine.feeding import Feed, Place, Way, phases, positions, scripts

PLACE = Place("state", 64)
_FROM_HALF = {"redecoded": False, "restored": False, "cut": True, "cut_and_shifted": True}


def recorded(script: list[list], name: str = "logits") -> list[int]:  # type: ignore[type-arg]
    """Tokens whose logits a script asks for under a name, in order."""
    found: list[int] = []
    for step, *rest in script:
        if step != "decode":
            continue
        parts, outputs = rest
        for _, start, stop, offset, told in parts:
            if told == name:
                found += [stop - 1] if outputs == "last" else list(range(start, stop))
                assert offset == 0 or len(parts) == 1
    return found


@given(way=st.sampled_from(get_args(Way)), n=st.integers(2, 200), size=st.integers(1, 70))
def test_every_way_records_each_token_once(way: Way, n: int, size: int) -> None:
    feed = Feed(way=way, size=size, first=3, last=4)
    found = phases(feed, n, PLACE)
    assert len(found) == (2 if feed.way == "restored" else 1)
    rows = recorded(found[-1])
    if way in ("restored", "cut", "cut_and_shifted"):
        assert rows == list(range(n // 2, n))
    elif way == "redecoded":
        assert rows == list(range(n))
    elif way == "last_logits":
        assert rows == sorted({*range(size - 1, n, size), n - 1})
    else:
        assert rows == list(range(n))
    assert positions(feed, n) >= n


def test_sequences_say_the_same_at_both_ends_and_others_between() -> None:
    (script,) = phases(Feed(way="sequences", count=4), 40, Place("s", 64))
    assert recorded(script) == recorded(script, "logits@3") == list(range(40))
    assert recorded(script, "logits@1") == recorded(script, "logits@2") == []
    for step in script:
        parts = step[1]
        assert sum(stop - start for _, start, stop, _, _ in parts) <= 64
        # each sequence goes on where it is, whatever tokens it reads
        assert len({start + offset for _, start, _, offset, _ in parts}) == 1
        assert len({start for _, start, _, _, _ in parts}) == 3


def test_one_by_one_at_both_ends() -> None:
    (script,) = phases(Feed(way="one_by_one", first=2, last=3), 10, PLACE)
    assert [step[1][0][1:3] for step in script] == [[0, 1], [1, 2], [2, 7], [7, 8], [8, 9], [9, 10]]
    (script,) = phases(Feed(way="one_by_one"), 3, PLACE)
    assert len(script) == 3


def test_a_shift_keeps_distances() -> None:
    (script,) = phases(Feed(way="cut_and_shifted"), 80, PLACE)
    names = [step[0] for step in script]
    assert names == ["decode", "remove", "shift", "decode"]
    gone = script[1][3]
    assert script[2][1:] == [0, gone, 40, -gone] and script[3][1][0][3] == -gone


def test_chunks_have_scripts_and_states_of_their_own() -> None:
    by_phase = scripts(Feed(way="restored"), [10, 20], 64, "/x/state")
    assert [len(phase) for phase in by_phase] == [2, 2]
    assert [script[1] for script in by_phase[0]] == [["save", "/x/state.0"], ["save", "/x/state.1"]]


def test_the_number_of_sequences_is_known() -> None:
    assert [Feed(way=way).n_seq for way in ("whole", "copied", "sequences")] == [1, 2, 3]
    with pytest.raises(ValueError):
        Feed(way="sideways")  # type: ignore[arg-type]
