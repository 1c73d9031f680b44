"""One decode: tokens in, logits out, and the callback that sees the graph's nodes meanwhile.

What is evaluated, and in which order, is the jobs' own business. Standard library, numpy and llama_cpp only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffharness.errors import EngineError, FixtureError


class GraphCallback:
    """What llama.cpp calls for every node; a subclass says what is done with one.

    An exception cannot cross the C code above us: it ends the graph, and `check` raises it after the decode.
    """

    error: BaseException | None = None

    def callback(self, address: int, ask: bool, _: object) -> bool:
        """Before a node whether it is wanted, after it whether to go on."""
        if self.error is not None:
            return False
        try:
            return self._ask(address) if ask else self._done(address)
        except BaseException as err:  # ctypes would print it and go on
            self.error = err
            return False

    def check(self) -> None:
        """Raise what could not cross the C code."""
        if self.error is not None:
            raise self.error

    def _ask(self, address: int) -> bool:
        raise NotImplementedError

    def _done(self, address: int) -> bool:
        raise NotImplementedError


class Entry(NamedTuple):
    """One token of a batch, and whether its logits are asked for."""

    token: int
    position: int
    sequence: int = 0
    wanted: bool = True


def check_tokens(llama: Any, model: Any, tokens: Iterable[int]) -> None:
    """FixtureError for a token that the model's vocabulary does not have: llama.cpp would read outside of a table."""
    size = n_vocab(llama, model)
    outside = next((token for token in tokens if not 0 <= token < size), None)
    if outside is not None:
        raise FixtureError(f"token {outside} is outside of the engine's vocabulary of {size}")


def n_vocab(llama: Any, model: Any) -> int:
    return int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)))


def decode(llama: Any, context: Any, entries: Sequence[Entry], row: int, watch: GraphCallback) -> None:
    """One llama_decode; `row` is the first token's, for the message. Raises what `watch` kept, EngineError."""
    batch = llama.llama_batch_init(len(entries), 0, 1)
    try:
        batch.n_tokens = len(entries)
        for i, entry in enumerate(entries):
            batch.token[i], batch.pos[i] = entry.token, entry.position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, entry.sequence, entry.wanted
        status = llama.llama_decode(context, batch)
    finally:
        llama.llama_batch_free(batch)
    watch.check()
    if status != 0:
        raise EngineError(f"llama_decode gives {status} at token {row}")


def logits(llama: Any, context: Any, shape: tuple[int, int], row: int) -> NDArray[np.float32]:
    """The last decode's logits, [wanted tokens, n_vocab], where the engine holds them: good until the next decode."""
    address = llama.llama_get_logits(context)
    if not address:
        raise EngineError(f"no logits at token {row}")
    return np.ctypeslib.as_array(address, shape=shape)
