"""Plays a cell's scripts in one context: what `feeding` writes, step by step, in the worker.

Logits are written by the row of the token that they belong to, so that every way of feeding compares with every
other; rows that no script records are NaN in the end. Standard library, numpy and llama_cpp only.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.captures import CaptureWriter
from diffharness.engine.capture import NodeReader
from diffharness.engine.decoding import Entry, GraphCallback, decode, logits, n_vocab
from diffharness.engine.kv_rounding import CacheRounder
from diffharness.engine.session import Session
from diffharness.errors import DiffharnessError, EngineError


class ImpossibleError(DiffharnessError):
    """This model's memory cannot do what a step asks for."""


class Watch(GraphCallback):
    """The evaluation callback: what rounds rows of the cache, and what reads nodes; either may be missing."""

    def __init__(self, reader: NodeReader | None, rounder: CacheRounder | None) -> None:
        self._reader, self._rounder = reader, rounder
        self._parts = [part for part in (rounder, reader) if part is not None]

    def _ask(self, address: int) -> bool:
        return any([part.callback(address, True, None) for part in self._parts])  # each of them is asked

    def _done(self, address: int) -> bool:
        return all([part.callback(address, False, None) for part in self._parts])

    def start(self, row: int) -> None:
        """The next graph's tokens are rows `row`, `row` + 1, ... of the capture."""
        if self._reader is not None:
            self._reader.start_chunk(row)

    def check(self) -> None:
        super().check()
        for part in self._parts:
            part.check()


class Player:
    """Plays scripts in one context. A script is a list of steps, each a name and its arguments (see `_STEPS`)."""

    def __init__(self, session: Session, model: Any, context: Any, writer: CaptureWriter | None, watch: Watch) -> None:
        self._llama, self._model, self._context, self._session = session.llama, model, context, session
        self._writer, self._watch = writer, watch
        self._memory = session.llama.llama_get_memory(context)
        self._n_vocab = n_vocab(session.llama, model)
        self._n_batch = session.llama.llama_n_batch(context)
        self._recorded: dict[str, NDArray[np.bool_]] = {}
        self._chunk: Sequence[int] = ()
        self._row = 0

    def play(self, chunk: Sequence[int], row: int, script: Sequence[Sequence[Any]]) -> None:
        """One chunk, from an empty memory; its first token is row `row` of the capture."""
        self._chunk, self._row = chunk, row
        self._session.forget(self._context)
        for name, *arguments in script:
            _STEPS[name](self, *arguments)

    def close(self) -> dict[str, list[list[int]]]:
        """Fill rows that were not recorded with NaN; the [start, stop) of those that were, by logits' name."""
        if self._writer is not None:
            self._writer.fill(np.nan)
        found = {}
        for name, recorded in self._recorded.items():
            edges = np.flatnonzero(np.diff(np.concatenate(([False], recorded, [False]))))
            found[name] = edges.reshape(-1, 2).tolist()
        return found

    # -- steps ----------------------------------------------------------------------------------------

    def _decode(self, parts: Sequence[tuple[int, int, int, int, str | None]], outputs: str) -> None:
        """One batch: of each part (sequence, start, stop, offset, name) the tokens, at their place plus `offset`.

        A batch of one part is cut where it is longer than n_batch. Logits go under `name`, unless it is null;
        `outputs` is `all` or `last`: of each part every token's or only the last one's are asked for.
        """
        if len(parts) > 1:
            self._call(parts, outputs)
            return
        ((seq, start, stop, offset, name),) = parts
        for first in range(start, stop, self._n_batch):
            self._call([(seq, first, min(first + self._n_batch, stop), offset, name)], outputs)

    def _call(self, parts: Sequence[tuple[int, int, int, int, str | None]], outputs: str) -> None:
        entries: list[Entry] = []
        targets: list[tuple[str | None, int]] = []  # of each row of the logits: the name and the row of the capture
        if len(parts) == 1:
            self._watch.start(self._row + parts[0][1])
        for seq, start, stop, offset, name in parts:
            for at in range(start, stop):
                wanted = outputs == "all" or at == stop - 1
                entries.append(Entry(self._chunk[at % len(self._chunk)], at + offset, seq, wanted))
                if wanted:
                    targets.append((name, self._row + at))
        decode(self._llama, self._context, entries, self._row + parts[0][1], self._watch)
        self._record(targets)

    def _record(self, targets: Sequence[tuple[str | None, int]]) -> None:
        values = logits(self._llama, self._context, (len(targets), self._n_vocab), targets[0][1])
        if self._writer is None:
            return
        first = 0
        for i in range(1, len(targets) + 1):  # runs of neighbouring rows are written at once
            name, row = targets[first]
            if i < len(targets) and targets[i] == (name, row + i - first):
                continue
            if name is not None:
                self._writer.write(name, row, values[first:i])
                seen = self._recorded.setdefault(name, np.zeros(self._writer.n_tokens, dtype=np.bool_))
                seen[row : row + i - first] = True
            first = i

    def _copy(self, source: int, target: int) -> None:
        """What sequence `source` holds, for `target` as well."""
        self._llama.llama_memory_seq_cp(self._need_memory(), source, target, -1, -1)

    def _remove(self, seq: int, start: int, stop: int) -> None:
        """Positions start .. stop - 1 of a sequence; -1 stands for its end."""
        memory, llama = self._need_memory(), self._llama
        if start == 0 and stop >= 0 and self._is_recurrent():
            raise ImpossibleError("a recurrent state cannot forget its beginning")
        if not llama.llama_memory_seq_rm(memory, seq, start, stop):
            raise ImpossibleError(f"this model's memory cannot be cut at position {start}: it holds no earlier state")

    def _hold(self, seq: int, position: int) -> None:
        """Whether what position `position` attends to is still there; a sliding-window cache may have let it go."""
        llama = self._llama
        window = getattr(llama, "llama_model_n_swa", lambda model: 0)(self._model)
        if window <= 0 or self._is_recurrent():  # of a recurrent state, `remove` tells
            return
        first = llama.llama_memory_seq_pos_min(self._need_memory(), seq)
        needed = max(0, position - window + 1)
        if first > needed:
            raise ImpossibleError(
                f"the sliding-window cache has let positions {needed} to {first - 1} go, which position {position} sees"
            )

    def _shift(self, seq: int, start: int, stop: int, delta: int) -> None:
        """Positions start .. stop - 1 become `delta` more; the engine turns the keys at the next decode."""
        if not self._llama.llama_memory_can_shift(self._need_memory()):
            raise ImpossibleError("llama.cpp does not shift this model's positions")
        self._llama.llama_memory_seq_add(self._memory, seq, start, stop, delta)

    def _save(self, path: str) -> None:
        """The context's whole state."""
        if not self._llama.llama_state_save_file(self._context, os.fsencode(path), None, 0):
            raise EngineError(f"llama.cpp does not save its state to {path}")

    def _restore(self, path: str) -> None:
        llama = self._llama
        tokens, n_tokens = (llama.llama_token * 1)(), ctypes.c_size_t(0)
        if not llama.llama_state_load_file(self._context, os.fsencode(path), tokens, 1, ctypes.byref(n_tokens)):
            raise EngineError(f"llama.cpp does not restore the state that it saved to {path}")

    def _need_memory(self) -> Any:
        if not self._memory:
            raise ImpossibleError("this model keeps no memory of earlier tokens")
        return self._memory

    def _is_recurrent(self) -> bool:
        llama = self._llama
        asked = ("llama_model_is_recurrent", "llama_model_is_hybrid")
        return any(getattr(llama, name)(self._model) for name in asked if hasattr(llama, name))


_STEPS: Mapping[str, Callable[..., None]] = {
    "decode": Player._decode,
    "copy": Player._copy,
    "remove": Player._remove,
    "hold": Player._hold,
    "shift": Player._shift,
    "save": Player._save,
    "restore": Player._restore,
}
