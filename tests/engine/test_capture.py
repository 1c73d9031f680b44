"""The callback by itself: what it asks for, where rows go, and that no exception is lost."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness.captures import Capture, CaptureWriter
from diffharness.engine.bindings import Node
from diffharness.engine.capture import Heartbeat, NodeReader, read_heartbeat
from diffharness.engine.nodes import table_for
from diffharness.errors import EngineError


class FakeGgml:
    """Nodes by address; a node's value is its address in every place, 3 wide."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes = {node.address: node for node in nodes}

    def node(self, address: int) -> Node:
        return self._nodes[address]

    def describe(self, node: Node) -> dict[str, Any]:
        return {"node": node.name, "op": node.op, "sources": list(node.sources)}

    def values(self, address: int, n_rows: int, *, streams: bool = False) -> np.ndarray:
        return np.full((n_rows, 3), address, np.float32)


def graph(rows: int) -> list[Node]:
    return [
        Node(1, "embd", "GET_ROWS", ("token_embd.weight", "inp_tokens"), rows),
        Node(2, "norm-0", "RMS_NORM", ("embd",), rows),
        Node(3, "Qcur-0", "MUL_MAT", ("blk.0.attn_q.weight", "norm-0"), rows),
        Node(4, "Qcur-0", "ADD", ("Qcur-0", "blk.0.attn_q.bias"), rows),
    ]


@pytest.fixture
def beat() -> Any:
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        yield file.fileno()


def compute(reader: NodeReader, nodes: list[Node]) -> list[str]:
    """What ggml's scheduler does with a graph; the nodes that were read."""
    read = []
    for node in nodes:
        if reader.callback(node.address, True, None):
            read.append(f"{node.name} {node.op}")
            if not reader.callback(node.address, False, None):
                break
    return read


def test_rows_follow_the_graphs_and_the_last_match_stays(tmp_path: Path, beat: int) -> None:
    with CaptureWriter(tmp_path / "c", 5) as writer:
        for start, sizes in ((0, (2, 1)), (3, (2,))):
            reader = NodeReader(FakeGgml(graph(0)), table_for("qwen2"), writer, None, Heartbeat(beat))  # type: ignore[arg-type]
            reader.start_chunk(start)
            for size in sizes:
                reader._ggml = FakeGgml(graph(size))  # type: ignore[assignment]
                read = compute(reader, graph(size))
                assert read == ["embd GET_ROWS", "Qcur-0 MUL_MAT", "Qcur-0 ADD"]
            assert reader.error is None and reader.n_nodes == 4
    capture = Capture(tmp_path / "c")
    assert capture.taps == ["token_embd", "blk.0.attn_q"]
    np.testing.assert_array_equal(capture.read("blk.0.attn_q"), np.full((5, 3), 4))


def test_notes_name_the_range_or_in_a_trace_the_node(tmp_path: Path, beat: int) -> None:
    nodes = graph(1)
    reader = NodeReader(FakeGgml(nodes), table_for("qwen2"), None, [], Heartbeat(beat))  # type: ignore[arg-type]
    assert compute(reader, nodes) == []
    assert read_heartbeat(beat) == {"phase": "eval", "row": 0, "first": "embd", "node": "Qcur-0", "op": "ADD"}
    reader = NodeReader(FakeGgml(nodes), table_for("qwen2"), None, [], Heartbeat(beat), trace=True)  # type: ignore[arg-type]
    assert len(compute(reader, nodes)) == len(nodes)
    assert read_heartbeat(beat)["sources"] == ["Qcur-0", "blk.0.attn_q.bias"]


def test_exceptions_are_kept_and_stop_the_graph(tmp_path: Path, beat: int) -> None:
    nodes = graph(9)  # more rows than the capture has
    writer = CaptureWriter(tmp_path / "c", 5)
    reader = NodeReader(FakeGgml(nodes), table_for("qwen2"), writer, None, Heartbeat(beat))  # type: ignore[arg-type]
    assert compute(reader, nodes) == ["embd GET_ROWS"]
    assert isinstance(reader.error, ValueError)
    assert not reader.callback(3, True, None)
    reader = NodeReader(FakeGgml(nodes), table_for("qwen2"), writer, None, Heartbeat(beat))  # type: ignore[arg-type]
    compute(reader, nodes[1:])
    assert isinstance(reader.error, EngineError) and "token embedding" in str(reader.error)
    writer.discard()


@pytest.mark.parametrize("raw", [b"", b"\0" * 4096, b"\xff" * 4096, b"\2\0\0\0[]", b'\5\0\0\0{"ph'])
def test_torn_notes_are_empty(beat: int, raw: bytes) -> None:
    os.pwrite(beat, raw, 0)
    assert read_heartbeat(beat) == {}
