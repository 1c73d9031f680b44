"""The worker's side of recording a graph: every node's inputs before it runs, and its output after.

The callback wants every node, so that each one is computed alone. In the ask phase its sources are still intact, also
those that the node will overwrite in place; they are copied into a slot of memory shared with the parent. In the done
phase the output follows. Nodes go to the parent in runs, a slot full at a time: two slots, so that the engine computes
the next nodes while the parent replays the last ones. Tensors of the model file are sent by name only: the parent
reads them from the file by its own code, and repacked weights could not be read at all. Nodes that compute nothing
(views) are sent without their bytes, and those that the graph marks as not to be computed are only counted.

Standard library, numpy and llama_cpp only.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.engine.bindings import GgmlTensor
from diffharness.engine.decoding import Entry, GraphCallback, check_tokens, decode, decode_states, read_states
from diffharness.engine.session import Job, Session
from diffharness.errors import EngineError

_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_COMPUTE = 16  # GGML_TENSOR_FLAG_COMPUTE; builds before 2026 mark no node
_EMBEDDING = "token_embd.weight"
_VIEWS = frozenset({"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
_FULL = 8 << 20  # bytes after which a slot goes to the parent
_LARGE = 64 << 20
_MANY = 64  # nodes after which it does
_ALIGN = 64


class _Slot:
    """A file shared with the parent, grown as nodes need it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._used = 0
        self.nodes: list[dict[str, Any]] = []

    def room(self, n_bytes: int) -> tuple[int, NDArray[np.uint8]]:
        """Where the next `n_bytes` go: the offset in the file, and the memory there."""
        at = -(-self._used // _ALIGN) * _ALIGN
        if at + n_bytes > self._map.size:
            size = max(at + n_bytes, 2 * self._map.size if self._map.size < _FULL else 0, mmap.PAGESIZE)
            try:
                os.ftruncate(self._descriptor, size)
                self._map = np.frombuffer(mmap.mmap(self._descriptor, size), dtype=np.uint8)
            except (OSError, ValueError) as error:
                raise MemoryError from error
        self._used = at + n_bytes
        return at, self._map[at : at + n_bytes]

    @property
    def is_full(self) -> bool:
        return self._used >= _FULL or len(self.nodes) >= _MANY

    def clear(self) -> None:
        """Empty it; one that a very large node has grown gives its memory back."""
        self._used, self.nodes = 0, []
        if self._map.size > _LARGE:
            self._map = np.empty(0, dtype=np.uint8)
            os.ftruncate(self._descriptor, 0)


class NodeRecorder(GraphCallback):
    """The callback. Off, it lets the graph run in one go."""

    def __init__(
        self, session: Session, slots: Sequence[int], tensors: Sequence[str], only: Sequence[str], *, fed: bool
    ) -> None:
        self._fed = fed  # with hidden states: the graph looks tokens up all the same, but does not compute that
        self._session, self._ggml, self._heartbeat = session, session.ggml, session.heartbeat
        self._slots = [_Slot(descriptor) for descriptor in slots]
        self._at = 0  # the slot being filled
        self._tensors, self._only = frozenset(tensors), frozenset(only)
        self._flagged = False  # whether this build marks nodes that are to be computed
        self._first: tuple[str, int] | None = None
        self._index = self._graph = self._evaluation = self._row = self._n_tokens = 0
        self._n_ubatch = 1
        self._open: dict[str, Any] | None = None
        self.on = False

    def start(self, evaluation: int, row: int, n_tokens: int, n_ubatch: int, on: bool) -> None:
        """The next graphs are of one evaluation, whose tokens begin at `row`; each takes `n_ubatch` of them."""
        self.on, self._evaluation, self._row, self._n_tokens = on, evaluation, row, n_tokens
        self._n_ubatch = n_ubatch
        self._first, self._index, self._graph = None, 0, -1

    def _ask(self, address: int) -> bool:
        tensor = GgmlTensor.from_address(address)
        self._flagged = self._flagged or bool(tensor.flags & _COMPUTE)
        key = (tensor.name.decode("utf-8", "replace"), tensor.op)
        if self._first is None or key == self._first:  # several graphs make up an evaluation of many micro-batches
            self._first, self._index, self._graph = key, 0, self._graph + 1
        index, self._index = self._index, self._index + 1
        what = self._ggml.node(address)
        self._heartbeat.beat(phase="eval", row=self._row, node=what.name, op=what.op)
        self._open = None
        if not self.on or (self._only and what.name not in self._only):
            return self.on
        self._open = self._node(address, tensor, what.op, index)
        return True

    def _node(self, address: int, tensor: GgmlTensor, op: str, index: int) -> dict[str, Any]:
        before = self._graph * self._n_ubatch  # tokens of this evaluation in earlier graphs
        is_view, empty = op in _VIEWS, 0 in tensor.ne
        skipped = self._flagged and not tensor.flags & _COMPUTE
        if self._fed and op == "GET_ROWS" and self._ggml.node(address).sources[0] == _EMBEDDING:
            skipped = True  # which comes before any node that is marked
        return {
            "index": index,
            "graph": self._graph,
            "evaluation": self._evaluation,
            "row": self._row + before,
            "n_tokens": max(1, min(self._n_ubatch, self._n_tokens - before)),
            "name": tensor.name.decode("utf-8", "replace"),
            "op": self._ggml.library.ggml_op_desc(address).decode(),
            "params": list(tensor.op_params),
            "is_view": is_view,
            "skipped": skipped,
            "sources": [
                None if source is None else self._source(source, with_bytes=not (is_view or empty or skipped))
                for source in _sources(address, tensor, op)
            ],
            "address": tensor.data,
        }

    def _source(self, address: int, with_bytes: bool) -> dict[str, Any]:
        tensor = GgmlTensor.from_address(address)
        told = self._told(tensor)
        root = GgmlTensor.from_address(tensor.view_src) if tensor.view_src else tensor
        name = root.name.decode("utf-8", "replace")
        usage = self._ggml.library.ggml_backend_buffer_get_usage(root.buffer) if root.buffer else 0
        if usage == _WEIGHTS and name in self._tensors:
            return {**told, "weight": name}
        return {**told, **self._copied(address)} if with_bytes else told

    def _told(self, tensor: GgmlTensor) -> dict[str, Any]:
        return {
            "name": tensor.name.decode("utf-8", "replace"),
            "type": self._ggml.type_name(tensor.type),
            "ne": list(tensor.ne),
            "nb": list(tensor.nb),
            "offset": tensor.view_offs,
            "address": tensor.data,
        }

    def _copied(self, address: int) -> dict[str, int]:
        if 0 in GgmlTensor.from_address(address).ne:
            return {"at": 0, "size": 0}
        size = int(self._ggml.library.ggml_nbytes(address))
        at, memory = self._slots[self._at].room(size)
        self._ggml.copy_bytes(address, memory)
        return {"at": at, "size": size}

    def _done(self, address: int) -> bool:
        node = self._open
        if node is None:
            return True
        told = self._told(GgmlTensor.from_address(address))
        node["on_host"] = self._ggml.is_on_host(address)
        with_bytes = not (node["is_view"] or node["skipped"])
        node["out"] = {**told, **self._copied(address)} if with_bytes else told
        slot = self._slots[self._at]
        slot.nodes.append(node)
        if slot.is_full:
            self.flush()
        return True

    def flush(self) -> None:
        """Hand the present slot over: waits until the parent asks, and thereby gives the other slot back."""
        slot = self._slots[self._at]
        if not slot.nodes:
            return
        if not sys.stdin.readline():
            raise EngineError("nobody asks for the recorded nodes any more")
        self._session.send("answer", slot=self._at, nodes=slot.nodes)
        self._at = 1 - self._at
        self._slots[self._at].clear()


def _sources(address: int, tensor: GgmlTensor, op: str) -> list[int | None]:
    """The addresses in `src`. Where rows are set in builds before 2026, the destination is not among them."""
    found = list(tensor.src)
    if op == "SET_ROWS" and found[2] is None:
        found[2] = address  # before the node runs it holds what was there
    return found


def record(session: Session, job: Job) -> dict[str, Any]:
    """Evaluate `evaluations` in order, and answer each request with the next recorded nodes, at last with none.

    An evaluation has `tokens`, the position `start` of the first one, whether to `clear` the memory before it, and
    whether it is recorded (`on`). With `states`, a tap of a capture whose row `first_row` is position 0, its rows go in
    and tokens are only counted.
    """
    llama, evaluations = session.llama, job["evaluations"]
    recorder = NodeRecorder(session, job["slots"], job["tensors"], job["only"], fed=job["states"] is not None)
    n_ctx = max(each["start"] + len(each["tokens"]) for each in evaluations)
    callback = llama.ggml_backend_sched_eval_callback(recorder.callback)
    fed, states = job["states"], None
    if fed is not None:
        states = read_states(fed)[fed["first_row"] :]
    with session.model(job) as model, session.context(job, model, n_ctx, callback) as context:
        if states is None:
            check_tokens(llama, model, (token for each in evaluations for token in each["tokens"]))
        session.phase("eval")
        for i, each in enumerate(evaluations):
            if each["clear"]:
                session.forget(context)
            for row, tokens in _pieces(each["tokens"], each["start"], llama.llama_n_batch(context)):
                recorder.start(i, row, len(tokens), llama.llama_n_ubatch(context), each["on"])
                if states is not None:
                    decode_states(llama, context, model, states[row : row + len(tokens)], row, row, recorder)
                    continue
                entries = [Entry(token, position) for position, token in enumerate(tokens, start=row)]
                decode(llama, context, entries, row, recorder)
        recorder.flush()
        sys.stdin.readline()
        session.send("answer", slot=0, nodes=[])
    return {}


def _pieces(tokens: Sequence[int], start: int, n_batch: int) -> Iterator[tuple[int, Sequence[int]]]:
    for first in range(0, len(tokens), n_batch):
        yield start + first, tokens[first : first + n_batch]
