"""Replays the nodes of a recording one after another, and measures how far the engine is from each.

A kernel's result is rounded to the type of the node's output and compared with what the engine computed. Nodes that
only change the view are checked by their geometry. What has no kernel is counted by op; nothing is passed over.

The rows of single tokens that meet a weight of the file wait, few as they are, for the batch that meets the same one,
so that each weight is dequantized once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffharness.errors import EngineError
from diffharness.recorded import RecordedNode, Value
from diffharness.replay.activation_quant import rounded
from diffharness.replay.call import Call, Held, Kernel, NoReplay, Partial
from diffharness.replay.choices import CHOICES, chosen
from diffharness.replay.distance import Distance, distance, quiet_power
from diffharness.replay.kernels import KERNELS
from diffharness.replay.views import misplaced
from diffharness.weights.source import WeightSource

_INTEGERS = frozenset({"I8", "I16", "I32", "I64"})
_ON_DEVICE = "a device computed it, whose arithmetic no replay knows"
_SPOILT = "what it was given is not finite, and what it makes of that is nobody's definition"
_WAITING = 128 << 20  # bytes of rows that wait for their weight at most
_PLAIN = frozenset({"F32", "F64"}) | _INTEGERS


@dataclass(frozen=True)
class Replayed:
    """One node and how far the engine's output is from its replay."""

    node: RecordedNode  # values without their bytes
    type: str  # what decides on the arithmetic: see `arithmetic_type`
    weight: str | None  # the first tensor of the file among the sources
    distance: Distance
    note: str | None = None  # what else is wrong, such as an index that was chosen twice

    @property
    def order(self) -> tuple[int, int, int]:
        return self.node.evaluation, self.node.graph, self.node.index


@dataclass
class Outcome:
    """What became of every node."""

    replayed: list[Replayed] = field(default_factory=list)
    without: Counter[str] = field(default_factory=Counter)  # nodes by op that no kernel knows
    refused: dict[str, str] = field(default_factory=dict)  # of those ops a kernel's reason, where one gave any
    n_views: int = 0
    n_empty: int = 0
    n_not_computed: int = 0
    n_nodes: int = 0
    changed: list[str] = field(default_factory=list)  # graphs of the same shape whose nodes differ

    def leave_out(self, node: RecordedNode, reason: str | None = None, count: int = 1) -> None:
        """Count nodes as not replayed."""
        self.without[node.op] += count
        if reason is not None:
            self.refused[node.op] = reason


def replay(
    nodes: Iterable[RecordedNode],
    weights: WeightSource,
    kernels: Mapping[str, Kernel] = KERNELS,
    watch: Callable[[RecordedNode], None] = lambda node: None,
) -> Outcome:
    """Every node; results in graph order, the batch before the single tokens.

    Raises what the iterator raises, and EngineError for a node that contradicts itself.
    """
    outcome, graphs = Outcome(), _Graphs()
    for stack in _stacked(_sorted_out(nodes, outcome, graphs, watch)):
        _replay(stack, weights, kernels, outcome)
    graphs.close()
    outcome.replayed.sort(key=lambda each: (each.node.path == "single", *each.order))
    outcome.changed = graphs.changed
    return outcome


def arithmetic_type(node: RecordedNode) -> str:
    """The output's type unless it is F32; then the first source's whose floats are not F32: the weight's, usually."""
    values = [node.out, *(source for source in node.sources if source is not None)]
    return next((value.type for value in values if value.type not in _INTEGERS and value.type != "F32"), "F32")


# -- what is replayed, and in what order ---------------------------------------------------------------


def _sorted_out(
    nodes: Iterable[RecordedNode], outcome: Outcome, graphs: _Graphs, watch: Callable[[RecordedNode], None]
) -> Iterator[RecordedNode]:
    """The nodes that a kernel is for; the others are counted here."""
    for node in nodes:
        watch(node)
        outcome.n_nodes += 1
        graphs.add(node)
        if not node.computed:
            outcome.n_not_computed += 1
        elif node.is_view:
            outcome.n_views += 1
            wrong = misplaced(node)
            if wrong is not None:
                infinite = Distance(float("inf"), None, float("inf"), float("inf"))
                outcome.replayed.append(Replayed(_light(node), arithmetic_type(node), None, infinite, wrong))
        elif 0 in node.out.shape:
            outcome.n_empty += 1
        elif not node.on_host:
            outcome.leave_out(node, _ON_DEVICE)
        else:
            yield node


def _stacked(nodes: Iterator[RecordedNode]) -> Iterator[list[RecordedNode]]:
    """Nodes to be replayed in one go: those that multiply rows by the same weight of the file, each other by itself."""
    waiting: dict[tuple[str, ...], list[RecordedNode]] = {}
    n_bytes = 0
    for node in nodes:
        key = _stack_key(node)
        if key is None:
            yield [node]
        elif node.path == "single":
            waiting.setdefault(key, []).append(_kept(node))
            n_bytes += sum(each.raw.size for each in (node.out, *node.sources) if each and each.raw is not None)
            if n_bytes > _WAITING:
                yield from waiting.values()
                waiting, n_bytes = {}, 0
        else:
            yield [node, *waiting.pop(key, [])]
    yield from waiting.values()


def _stack_key(node: RecordedNode) -> tuple[str, ...] | None:
    """What nodes have in common whose rows may be put together; None of a node that stays by itself."""
    if node.op != "MUL_MAT" or len(node.sources) < 2:
        return None
    weight, x = node.sources[:2]
    if weight is None or x is None or not weight.is_weight or x.raw is None:
        return None
    if x.type != "F32" or node.out.type != "F32" or x.shape[:2] != (1, 1) or weight.shape[:2] != (1, 1):
        return None
    whole = (weight.name, str(weight.offset), str(weight.shape), str(weight.strides))
    return (*whole, node.params.tobytes().hex())


def _kept(node: RecordedNode) -> RecordedNode:
    """The node with values of its own, which outlive the recorder's."""

    def own(value: Value | None) -> Value | None:
        return value if value is None or value.raw is None else replace(value, raw=value.raw.copy())

    out = own(node.out)
    assert out is not None
    return replace(node, out=out, sources=tuple(own(source) for source in node.sources))


def _joined(nodes: Sequence[RecordedNode]) -> RecordedNode:
    """One node with the rows of source 1, and of the output, of all of them."""
    first = nodes[0]
    if len(nodes) == 1:
        return first
    xs = [each for node in nodes if (each := node.sources[1]) is not None]
    sources = (first.sources[0], _rows_of(xs), *first.sources[2:])
    return replace(first, out=_rows_of([node.out for node in nodes]), sources=sources)


def _rows_of(values: Sequence[Value]) -> Value:
    """F32 matrices [1, 1, n, width] one below the other."""
    rows = np.concatenate([value.array()[0, 0] for value in values])
    n, width = rows.shape
    strides = (4 * rows.size, 4 * rows.size, 4 * width, 4)
    return replace(values[0], shape=(1, 1, n, width), strides=strides, raw=rows.reshape(-1).view(np.uint8))


class _Graphs:
    """Whether evaluations of one shape have the same nodes."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], list[str]] = {}  # by path, tokens and graph: the first one's nodes
        self._at: tuple[int, int] | None = None  # evaluation and graph of the present one
        self._key: tuple[str, int, int] = ("", 0, 0)
        self._nodes: list[str] = []
        self.changed: list[str] = []

    def add(self, node: RecordedNode) -> None:
        if (node.evaluation, node.graph) != self._at:
            self.close()
            self._at, self._key = (node.evaluation, node.graph), (node.path, node.n_tokens, node.graph)
        self._nodes.append(f"{node.name} ({node.op})")

    def close(self) -> None:
        """Compare the present graph with the first one of its shape."""
        nodes, self._nodes = self._nodes, []
        known = self._known.setdefault(self._key, nodes)
        if known == nodes:
            return
        i = next((i for i, (a, b) in enumerate(zip(known, nodes, strict=False)) if a != b), min(len(known), len(nodes)))
        was, is_now = (each[i] if i < len(each) else "no node" for each in (known, nodes))
        self.changed.append(f"node {i} was {was}, and then {is_now}")


# -- one replay ----------------------------------------------------------------------------------------


def _replay(
    nodes: Sequence[RecordedNode], weights: WeightSource, kernels: Mapping[str, Kernel], outcome: Outcome
) -> None:
    first = nodes[0]
    kernel = kernels.get(first.op)
    if kernel is None:
        outcome.leave_out(first, count=len(nodes))
        return
    joined = _joined(nodes)
    try:
        result = kernel(Call(joined, weights))
    except NoReplay as reason:
        outcome.leave_out(first, reason.message, len(nodes))
        return
    values, defined = _values(joined, result)
    quiet = quiet_power(values) if len(nodes) > 1 else None
    at = 0
    for node in nodes:
        rows = slice(at, at + node.out.shape[2]) if len(nodes) > 1 else slice(None)
        at += node.out.shape[2]
        part = None if defined is None else defined[:, :, rows]
        found = _measured(node, values[:, :, rows], part, quiet)
        if np.isfinite(found.distance.nmse) or found.note is not None or not _spoilt(node):
            outcome.replayed.append(found)
        else:
            outcome.leave_out(node, _SPOILT)


def _spoilt(node: RecordedNode) -> bool:
    """Whether a source holds NaN or +inf; -inf is what masks are made of."""
    for source in node.sources:
        if source is not None and source.raw is not None and source.type in ("F32", "F16"):
            values = source.array()
            if not (values < np.inf).all():
                return True
    return False


def _values(node: RecordedNode, result: torch.Tensor | Partial | Held) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """What the node should hold: the kernel's result in the node's shape, as its type holds it."""
    values = result if isinstance(result, torch.Tensor) else result.values
    if values.numel() != int(np.prod(node.out.shape)):
        raise EngineError(
            f"the replay of {node.name} ({node.op}) has shape {list(values.shape)}, the node {list(node.out.shape)}"
        )
    values = values.reshape(node.out.shape)
    if node.out.type not in _PLAIN and not isinstance(result, Held):
        values = rounded(values.float(), node.out.type).reshape(node.out.shape)
    if not isinstance(result, Partial):
        return values.cpu().numpy(), None
    return values.cpu().numpy(), result.defined.expand(result.values.shape).reshape(node.out.shape).numpy()


def _measured(
    node: RecordedNode, values: NDArray[Any], defined: NDArray[np.bool_] | None, quiet: float | None
) -> Replayed:
    engine, note = node.out.array(), None
    if node.op in CHOICES:
        engine, values, note = chosen(node, engine, values)
    if values.dtype == np.float64 and engine.dtype != np.float64:
        values = values.astype(np.float32) if node.out.type == "F32" else values
    found = distance(engine, values, defined, quiet)
    weight = next((source.name for source in node.sources if source is not None and source.is_weight), None)
    return Replayed(_light(node), arithmetic_type(node), weight, found, note)


def _light(node: RecordedNode) -> RecordedNode:
    """The node without its bytes, to be kept."""

    def light(value: Value) -> Value:
        return value if value.raw is None else replace(value, raw=np.empty(0, dtype=np.uint8))

    return replace(
        node, out=light(node.out), sources=tuple(None if each is None else light(each) for each in node.sources)
    )
