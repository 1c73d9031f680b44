"""Ways of feeding one text to the engine that must all give the same logits: names in, scripts for the worker out.

A way is a pure function from the text's length to phases, each a script of steps for `exercise.Player`; phases
after the first run in a new process. What a script records is told by name and row; a second sequence that must
say the same records under `logits@2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Step = list[Any]
Script = list[Step]
Phases = list[Script]

LOGITS = "logits"
Way = Literal[
    "whole", "pieces", "one_by_one", "last_logits", "halves", "sequences", "copied", "redecoded", "restored",
    "cut", "cut_and_shifted", "shifted", "offset",
]  # fmt: skip
Count = Annotated[int, Field(ge=1, le=1 << 20)]


class Feed(BaseModel):
    """One way of feeding. Fields that a way has no use for are ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    way: Way = "whole"
    size: Count = 64  # tokens of a piece
    first: int | None = Field(default=None, ge=0)  # tokens at the beginning that come one by one; None: all
    last: int = Field(default=0, ge=0)  # tokens at the end that do
    count: Annotated[int, Field(ge=2, le=16)] = 3  # sequences

    @property
    def n_seq(self) -> int:
        """Sequences that the cache must have room for."""
        return self.count if self.way == "sequences" else 2 if self.way == "copied" else 1


@dataclass(frozen=True)
class Place:
    """Where a script keeps a state between its phases, and how many tokens a batch of several sequences may hold."""

    state: str
    n_batch: int


def phases(feed: Feed, n: int, place: Place) -> Phases:
    """The scripts for a text of `n` tokens, one for each process."""
    return _WAYS[feed.way](feed, n, place)


def positions(feed: Feed, n: int) -> int:
    """Cells of the cache that a text of `n` tokens takes in each sequence, and room to move in."""
    return n + (_distance(n) if feed.way == "shifted" else 0)


def _decode(start: int, stop: int, *, seq: int = 0, offset: int = 0, name: str | None = LOGITS) -> Step:
    return ["decode", [[seq, start, stop, offset, name]], "all"]


def _pieces(start: int, stop: int, size: int) -> Script:
    return [_decode(at, min(at + size, stop)) for at in range(start, stop, size)]


def _one_by_one(feed: Feed, n: int, place: Place) -> Phases:
    """The first tokens one by one, the rest in a batch, and the last ones one by one again."""
    first = n if feed.first is None else min(feed.first, n)
    last = max(first, n - feed.last)
    middle = [_decode(first, last)] if last > first else []
    return [[*_pieces(0, first, 1), *middle, *_pieces(last, n, 1)]]


def _last_logits(feed: Feed, n: int, place: Place) -> Phases:
    """Logits of each piece's last token only, as tools ask for them; the engine drops other rows in its last layer."""
    return [[[name, parts, "last"] for name, parts, _ in _pieces(0, n, feed.size)]]


def _halves(feed: Feed, n: int, place: Place) -> Phases:
    return [[_decode(0, n // 2), _decode(n // 2, n)]]


def _sequences(feed: Feed, n: int, place: Place) -> Phases:
    """The text in the first and the last sequence, and between them others that begin elsewhere in it.

    Were they all the same, keys of one that leak into another would change nothing.
    """
    size = max(1, min(n, place.n_batch // feed.count))
    script: Script = []
    for at in range(0, n, size):
        stop = min(at + size, n)
        parts = []
        for seq in range(feed.count):
            turn = n * seq // (feed.count - 1) % n  # 0 for the first and the last
            name = LOGITS if seq == 0 else f"{LOGITS}@{seq}" if turn == 0 else None
            parts.append([seq, at + turn, stop + turn, -turn, name])
        script.append(["decode", parts, "all"])
    return [script]


def _copied(feed: Feed, n: int, place: Place) -> Phases:
    """The first half copied into another sequence, which goes on; then the first one goes on too."""
    half = n // 2
    other = _decode(half, n, seq=1, name=f"{LOGITS}@1")
    return [[_decode(0, half), ["copy", 0, 1], other, _decode(half, n)]]


def _redecoded(feed: Feed, n: int, place: Place) -> Phases:
    """The second half decoded, removed, and decoded again."""
    half = n // 2
    again = [["hold", 0, half], ["remove", 0, half, -1], _decode(half, n)]
    return [[_decode(0, half), _decode(half, n, name=None), *again]]


def _restored(feed: Feed, n: int, place: Place) -> Phases:
    half = n // 2
    return [[_decode(0, half), ["save", place.state]], [["restore", place.state], _decode(half, n)]]


def _cut(feed: Feed, n: int, place: Place) -> Phases:
    """The beginning removed after half of the text; the rest goes on where it is."""
    half, gone = n // 2, _distance(n)
    return [[_decode(0, half, name=None), ["remove", 0, 0, gone], _decode(half, n)]]


def _cut_and_shifted(feed: Feed, n: int, place: Place) -> Phases:
    """The same, and what is left moved to the front: a context shift. Distances, and so values, stay the same."""
    half, gone = n // 2, _distance(n)
    moved = [["remove", 0, 0, gone], ["shift", 0, gone, half, -gone]]
    return [[_decode(0, half, name=None), *moved, _decode(half, n, offset=-gone)]]


def _shifted(feed: Feed, n: int, place: Place) -> Phases:
    """Everything moved away from the front after half of the text, where the rest then goes on."""
    half, away = n // 2, _distance(n)
    return [[_decode(0, half), ["shift", 0, 0, half, away], _decode(half, n, offset=away)]]


def _offset(feed: Feed, n: int, place: Place) -> Phases:
    """Everything further from position 0 from the start: the same values where only distances count."""
    return [[_decode(0, n, offset=_distance(n))]]


def _distance(n: int) -> int:
    return max(1, n // 4)


_WAYS: Mapping[str, Callable[[Feed, int, Place], Phases]] = {
    "whole": lambda feed, n, place: [[_decode(0, n)]],
    "pieces": lambda feed, n, place: [_pieces(0, n, feed.size)],
    "one_by_one": _one_by_one,
    "last_logits": _last_logits,
    "halves": _halves,
    "sequences": _sequences,
    "copied": _copied,
    "redecoded": _redecoded,
    "restored": _restored,
    "cut": _cut,
    "cut_and_shifted": _cut_and_shifted,
    "shifted": _shifted,
    "offset": _offset,
}


def scripts(feed: Feed, lengths: Sequence[int], n_batch: int, state: str) -> list[list[Script]]:
    """By phase, the script of each chunk; each chunk has a state file of its own."""
    by_chunk = [phases(feed, n, Place(f"{state}.{i}", n_batch)) for i, n in enumerate(lengths)]
    return [list(phase) for phase in zip(*by_chunk, strict=True)]
