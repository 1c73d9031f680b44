"""Reading graph nodes while llama.cpp computes them, through its `cb_eval` callback.

The scheduler asks about every node before computing it ("ask"), and calls again once a wanted node
has its value ("done"). A node is read in that second call and not later: later nodes may work in
place and overwrite it. Before each computation a note of what begins goes into memory shared with
the parent, so that a crash can be pinned to a node. Standard library and numpy only.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from typing import Any

from diffharness.captures import CaptureWriter
from diffharness.engine.bindings import Ggml, Node
from diffharness.engine.decoding import GraphCallback
from diffharness.engine.nodes import NodeTable, is_wanted
from diffharness.errors import EngineError
from diffharness.taps import BEFORE_LAYERS, layer_tap, split

HEARTBEAT_SIZE = 4096


class Heartbeat:
    """What the worker is doing, in a file shared with its parent: a length, then JSON."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, HEARTBEAT_SIZE)

    def beat(self, **note: Any) -> None:
        raw = json.dumps(note).encode()[: HEARTBEAT_SIZE - 4]
        self._map[: 4 + len(raw)] = len(raw).to_bytes(4, "little") + raw


def read_heartbeat(fd: int) -> dict[str, Any]:
    """The last note in a heartbeat file; empty if there is none, or if the process died in writing it."""
    raw = os.pread(fd, HEARTBEAT_SIZE, 0)
    try:
        note = json.loads(raw[4 : 4 + int.from_bytes(raw[:4], "little")])
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


class NodeReader(GraphCallback):
    """The callback: matches nodes to taps and writes their values into a capture.

    `trace` stops at every node instead, so that the last note is the very node that was begun;
    without it the note names the range of nodes that the scheduler computes in one go. Of a model that is a slice of
    a larger one, `first_layer` is the number that its first layer has there, and so in the taps' names.
    """

    def __init__(
        self,
        ggml: Ggml,
        table: NodeTable,
        writer: CaptureWriter | None,
        wanted: Sequence[str] | None,
        heartbeat: Heartbeat,
        *,
        trace: bool = False,
        first_layer: int = 0,
    ) -> None:
        self._ggml, self._table, self._writer, self._wanted = ggml, table, writer, wanted
        self._heartbeat, self._trace, self._first_layer = heartbeat, trace, first_layer
        self._fed = False  # with hidden states: such a graph tells no number of tokens, and has no embedding
        self.n_nodes = 0  # of the largest graph seen
        self._asked = 0  # nodes of the present graph
        self._row = self._rows = 0  # where the present graph's tokens start in the capture, and how many they are
        self._begun: str | None = None  # first node asked about since the last one was done
        self._pending: list[str] = []

    def start_chunk(self, row: int) -> None:
        """The next graph's tokens are rows `row`, `row` + 1, ... of the capture."""
        self._row, self._rows = row, 0

    def start_fed(self, row: int, rows: int) -> None:
        """The next graph is fed with `rows` hidden states, from row `row` of the capture on."""
        self._fed, self._row, self._rows, self._asked = True, row, rows, 0

    def _ask(self, address: int) -> bool:
        node = self._ggml.node(address)
        # every graph that is fed with tokens begins with it
        if not self._fed and node.op == "GET_ROWS" and node.sources[0] == "token_embd.weight":
            self._row, self._rows, self._asked = self._row + self._rows, node.rows, 0
        self._asked += 1
        self.n_nodes = max(self.n_nodes, self._asked)
        self._note(node)
        if self._trace:
            return True
        taps = [self._named(tap) for tap in self._table.match(node.name, node.op, node.sources)]
        self._pending = [tap for tap in taps if self._is_wanted(tap)]
        return bool(self._pending)

    def _named(self, tap: str) -> str:
        layer, name = split(tap)
        return tap if layer is None or not self._first_layer else layer_tap(layer + self._first_layer, name)

    def _is_wanted(self, tap: str) -> bool:
        if self._writer is None or (self._fed and tap in BEFORE_LAYERS):
            return False
        return is_wanted(tap, self._wanted)

    def _note(self, node: Node) -> None:
        if self._trace:
            self._heartbeat.beat(phase="eval", row=self._row, **self._ggml.describe(node))
            return
        self._begun = self._begun or node.name
        self._heartbeat.beat(phase="eval", row=self._row, first=self._begun, node=node.name, op=node.op)

    def _done(self, address: int) -> bool:
        self._begun = None
        if self._writer is None or not self._pending:
            return True
        if not self._rows:
            raise EngineError("the graph does not begin with the token embedding; its tokens cannot be counted")
        for tap in self._pending:
            values = self._ggml.values(address, self._rows, streams=split(tap)[1] in self._table.streams)
            self._writer.write(tap, self._row, values)
        return True
