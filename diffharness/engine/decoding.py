"""One decode: tokens or hidden states in, logits out, and the callback that sees the graph's nodes meanwhile.

What is evaluated, and in which order, is the jobs' own business. Standard library, numpy and llama_cpp only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffharness.captures import Capture
from diffharness.errors import EngineError, FixtureError

# llama_rope_type of models whose every token has four positions: LLAMA_ROPE_TYPE_MROPE, _IMROPE and _VISION
_FOUR_POSITIONS = frozenset({8, 40, 24})


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


def read_states(told: Mapping[str, Any]) -> NDArray[np.float32]:
    """The hidden states that a job's `states` name: a tap of a capture, divided by a factor; not yet in memory."""
    values = Capture(told["capture"]).read(told["tap"])
    return values if told["factor"] == 1.0 else values / np.float32(told["factor"])


def decode_states(
    llama: Any, context: Any, model: Any, states: NDArray[np.float32], start: int, row: int, watch: GraphCallback
) -> None:
    """One llama_decode of hidden states [n, width], as the first layer's input, at positions from `start` on.

    The width is the model's `n_embd`; where it takes wider rows (features added in later layers) the rest is 0, as it
    is for tokens. Logits of all are asked for. Raises as `decode`.
    """
    n, width = states.shape
    wide = int(getattr(llama, "llama_model_n_embd_inp", llama.llama_model_n_embd)(model))
    if width > wide:
        raise EngineError(f"the model takes hidden states of width {wide}, and these are {width} wide")
    rows = np.zeros((n, wide), dtype=np.float32)
    rows[:, :width] = states
    n_pos = 4 if int(llama.llama_model_rope_type(model)) in _FOUR_POSITIONS else 1
    positions = np.zeros((n_pos, n), dtype=np.int32)  # of a text's token the first three are the same, the fourth is 0
    positions[:3] = np.arange(start, start + n)
    batch = llama.llama_batch_init(n, 0, 1)
    given = llama.llama_batch(n_tokens=n, n_seq_id=batch.n_seq_id, seq_id=batch.seq_id, logits=batch.logits)
    given.embd = rows.ctypes.data_as(type(given.embd))
    given.pos = positions.ctypes.data_as(type(given.pos))
    try:
        for i in range(n):
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
        status = llama.llama_decode(context, given)
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
