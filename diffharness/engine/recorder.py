"""The parent's side of recording: a worker evaluates tokens, and its nodes come as they are computed.

The memory that it takes is that of a few nodes. What is evaluated is a schedule, `Evaluation` after `Evaluation`;
`schedule` makes the usual one.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.engine.process import Dialogue
from diffharness.engine.quantizer import nameless_file
from diffharness.engine.runner import States, check_overrides
from diffharness.errors import FixtureError
from diffharness.recorded import RecordedNode, Value
from diffharness.settings import EngineSettings

_NOTHING: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

# The engine's threads sleep where they have nothing to do: spinning, they would take the cores from this process, which
# works through the nodes meanwhile.
_SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Evaluation:
    """Tokens for one call of the engine, the first at position `start`; of those not `on` no node is recorded."""

    tokens: tuple[int, ...]
    start: int = 0
    clear: bool = True  # forget all tokens before
    on: bool = True


def schedule(tokens: Sequence[int], n_batch: int, n_single: int = 2) -> list[Evaluation]:
    """Single tokens after an unrecorded prompt, then the prompt as a batch.

    The single ones come first so that their few rows can wait for the batch, and each weight is dequantized once.
    Of a text that is too short the prompt gives tokens to the single ones, but never its last two.
    """
    if len(tokens) < 2:
        raise FixtureError(f"expected at least 2 tokens to record, found {len(tokens)}")
    n_batch = min(n_batch, max(2, len(tokens) - n_single))
    prompt, rest = tuple(tokens[:n_batch]), tokens[n_batch : n_batch + n_single]
    singles = [Evaluation((token,), n_batch + i, clear=False) for i, token in enumerate(rest)]
    return [*([Evaluation(prompt, on=False), *singles] if singles else []), Evaluation(prompt)]


def one_by_one(tokens: Sequence[int]) -> list[Evaluation]:
    """Every token by itself, from the first on."""
    return [Evaluation((token,), i, clear=i == 0) for i, token in enumerate(tokens)]


class Recorder:
    """An iterator over the recorded nodes. Close it, or use it as a context manager.

    `tensors` are the names of the file's tensors, which are not sent; `only` names the nodes to record, all without.
    With `states` tokens are only counted, and rows of a capture go in, the one of position 0 being `first_row`.
    Raises EngineCrash if the engine dies or refuses, FixtureError for a token outside of its vocabulary.
    """

    def __init__(
        self,
        settings: EngineSettings,
        model: str | os.PathLike[str],
        evaluations: Sequence[Evaluation],
        tensors: Collection[str],
        *,
        overrides: Sequence[str] = (),
        only: Collection[str] = (),
        states: States | None = None,
        first_row: int = 0,
    ) -> None:
        check_overrides(overrides)
        self._evaluations, self._n_threads = list(evaluations), settings.threads
        self._slots = [_Slot(), _Slot()]
        job = {
            "kind": "record",
            "model": str(Path(model).absolute()),
            "settings": settings.model_dump(mode="json"),
            "overrides": list(overrides),
            "evaluations": [
                {"tokens": list(map(int, each.tokens)), "start": each.start, "clear": each.clear, "on": each.on}
                for each in evaluations
            ],
            "slots": [slot.descriptor for slot in self._slots],
            "tensors": sorted(tensors),
            "only": sorted(only),
            "states": None if states is None else {**states.as_job(), "first_row": first_row},
        }
        self._occurrences: Counter[tuple[int, int, str, str]] = Counter()
        try:
            self._dialogue = Dialogue(settings, job, [slot.descriptor for slot in self._slots], _SLEEPING)
        except BaseException:
            self._close_slots()
            raise

    def __iter__(self) -> Iterator[RecordedNode]:
        """Nodes in the order of evaluation; a node's values are good until the next one is asked for."""
        while True:
            answer = self._dialogue.ask({"next": True})
            if not answer["nodes"]:
                return
            slot = self._slots[answer["slot"]]
            for told in answer["nodes"]:
                yield self._node(told, slot)

    def _node(self, told: Mapping[str, Any], slot: _Slot) -> RecordedNode:
        key = (told["evaluation"], told["graph"], told["name"], told["op"])
        occurrence = self._occurrences[key]
        self._occurrences[key] += 1
        return RecordedNode(
            index=told["index"],
            name=told["name"],
            op=told["op"],
            params=np.array(told["params"], dtype=np.int32),
            out=_value(told["out"], slot),
            sources=tuple(None if source is None else _value(source, slot) for source in told["sources"]),
            path="single" if told["n_tokens"] == 1 else "batch",
            row=told["row"],
            n_tokens=told["n_tokens"],
            n_threads=self._n_threads,
            evaluation=told["evaluation"],
            graph=told["graph"],
            occurrence=occurrence,
            is_view=told["is_view"],
            computed=not told["skipped"],
            on_host=told["on_host"],
        )

    def close(self) -> None:
        """Stop the worker, and give the shared memory back; may be called again."""
        self._dialogue.close()
        self._close_slots()

    def _close_slots(self) -> None:
        for slot in self._slots:
            slot.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Slot:
    """A file that the worker fills and this process reads."""

    def __init__(self) -> None:
        self.descriptor = nameless_file("recorder")
        self._map = _NOTHING

    def bytes(self, at: int, size: int) -> NDArray[np.uint8]:
        if at + size > self._map.size:
            self._map = np.frombuffer(mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        return self._map[at : at + size]

    def close(self) -> None:
        self._map = _NOTHING
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _value(told: Mapping[str, Any], slot: _Slot) -> Value:
    raw: NDArray[np.uint8] | None = _NOTHING
    name = told["name"]
    if "weight" in told:
        name, raw = told["weight"], None
    elif told.get("size"):
        raw = slot.bytes(told["at"], told["size"])
    return Value(
        name=name,
        type=told["type"],
        shape=_four(told["ne"]),
        strides=_four(told["nb"]),
        raw=raw,
        offset=told["offset"],
        address=told["address"] or 0,
    )


def _four(fastest_first: Sequence[int]) -> tuple[int, int, int, int]:
    a, b, c, d = fastest_first
    return d, c, b, a
