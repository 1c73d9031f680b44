"""The order of taps, which says what differs first, is one of computation: in the reference and in the engine's graph.

The reference is asked by changing one tap's values under its hands, in every layer at once, each layer being fed with
inputs that stay: what follows from the tap moves, and that must be behind it in the order. The engine's nodes
are asked through the memory that they read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffharness import taps
from diffharness.engine.nodes import table_for
from diffharness.engine.recorder import Evaluation, Recorder
from diffharness.engine.strict import strict_settings
from diffharness.recorded import RecordedNode, Value
from diffharness.reference.runner import Layer, Reference
from diffharness.settings import load_engine
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.names import MAPS
from diffharness.weights.synth import SynthSource
from tests.oracles.agree import nmse, reference_taps

N_TOKENS = 16
MOVED = 1e-9  # NMSE from which on a value is another one: float32's own rounding is far below
FIRST = frozenset({"token_embd", "layer_out"})  # what layers are fed with, whatever these taps say

Edge = tuple[str, str]  # full names of a tap and of one that depends on it


def misplaced(edges: Iterable[Edge]) -> set[Edge]:
    """Edges whose second tap comes first in the order, without layers."""
    late = {edge for edge in edges if taps.graph_order(edge[0]) > taps.graph_order(edge[1])}
    return {(taps.split(a)[1], taps.split(b)[1]) for a, b in late}


# -- the reference ---------------------------------------------------------------------------------------


class Poked:
    """A model's forward on fixed layer inputs, with or without one tap's values changed."""

    def __init__(self, arch: str) -> None:
        source = SynthSource(arch)
        self._reference = Reference(source)
        n_vocab = source.tensors["token_embd.weight"].shape[0]
        self._ids = torch.randint(0, n_vocab, (N_TOKENS,), generator=torch.Generator().manual_seed(1))
        self._plain = reference_taps(source, self._ids)
        self.usual = self.values()

    def values(self, poked: str | None = None) -> dict[str, torch.Tensor]:
        """Every tap on the given inputs, as told; the values of the one `poked` are then changed."""
        found: dict[str, torch.Tensor] = {}
        noise = torch.Generator().manual_seed(2)

        def tell(name: str, own: torch.Tensor, local: torch.Tensor | None, rows: slice) -> None:
            assert local is not None and name not in found
            found[name] = local.clone()
            if taps.split(name)[1] == poked:
                size = local.square().mean().sqrt()
                local += 0.3 * size * torch.randn(local.shape, generator=noise)

        self._reference.run([self._ids.numpy()], engine_inputs=self._inputs, on_tap=tell, keep_logits=False)
        return found

    def _inputs(self, layer: Layer) -> NDArray[np.float32]:
        last = self._reference.model.n_layer - 1
        before = last if layer == "head" else int(layer) - 1
        value: NDArray[np.float32] = self._plain["token_embd" if before < 0 else f"blk.{before}.layer_out"].numpy()
        return value

    def behind(self, tap: str) -> Iterator[Edge]:
        """Edges from `tap`, of any layer, to what follows from it there."""
        changed = self.values(tap)
        assert changed.keys() == self.usual.keys()
        for name, value in changed.items():
            layer, other = taps.split(name)
            here = tap if layer is None else taps.layer_tap(layer, tap)
            if other != tap and here in self.usual and nmse(value, self.usual[name]) > MOVED:
                yield here, name


@pytest.mark.parametrize("arch", MAPS)
def test_no_tap_of_the_reference_comes_before_one_that_it_depends_on(arch: str) -> None:
    model = Poked(arch)
    names = list(dict.fromkeys(taps.split(name)[1] for name in model.usual))
    for tap in names:
        if tap in FIRST or tap == "logits":
            continue
        edges = set(model.behind(tap))
        assert not misplaced(edges), tap
        # Values written into a tap reach what follows: steps can be fed one by one.
        stuck = {name for name in model.usual if taps.split(name)[1] == tap} - {name for name, _ in edges}
        assert not stuck, stuck


def test_a_wrong_order_of_the_reference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "_RANK", exchanged("attn_q_rope", "attn_q_rope_norm"))
    assert misplaced(Poked("llama4").behind("attn_q_rope")) == {("attn_q_rope", "attn_q_rope_norm")}


def exchanged(one: str, other: str) -> dict[str, int]:
    ranks = {name: i for i, name in enumerate(taps.LAYER_TAPS)}
    return ranks | {one: ranks[other], other: ranks[one]}


# -- the engine ------------------------------------------------------------------------------------------

# Norms behind the rotation; keys that are values, too; parallel mixers; latent attention; delta rules; streams.
GRAPHS = ("hunyuan-dense", "llama4", "gemma4", "falcon-h1", "deepseek2", "kimi-linear", "qwen3next", "gemma3n")


class Memory:
    """Which taps went into what lies where, as far as nodes tell it."""

    def __init__(self) -> None:
        self._written: list[tuple[int, int, frozenset[str]]] = []

    def read(self, value: Value) -> frozenset[str]:
        start, stop = span(value)
        parts = [made for a, b, made in self._written if a < stop and start < b]
        return frozenset().union(*parts)

    def write(self, value: Value, made: frozenset[str]) -> None:
        start, stop = span(value)
        if stop - start == np.prod(value.shape) * width(value):  # without gaps: what lay there is gone
            rest = [(a, min(b, start), old) for a, b, old in self._written if a < start]
            rest += [(max(a, stop), b, old) for a, b, old in self._written if b > stop]
            self._written = [(a, b, old) for a, b, old in rest if a < b]
        self._written.append((start, stop, made))


def width(value: Value) -> int:
    return {"F16": 2, "I64": 8}.get(value.type, 4)


def span(value: Value) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(value.shape, value.strides, strict=True))
    return value.address, value.address + last + width(value)


def graph_edges(nodes: Iterable[RecordedNode], match: Callable[[RecordedNode], list[str]]) -> set[Edge]:
    """Every pair of taps of which the second is computed from the first; two names of one node are no pair."""
    memory, edges = Memory(), set[Edge]()
    same: dict[str, set[str]] = {}  # taps that one node holds
    for node in nodes:
        inputs = [source for source in node.sources if source is not None and not source.is_weight]
        made = frozenset().union(*map(memory.read, inputs))
        found = match(node)
        for tap in found:
            same.setdefault(tap, set()).update(found)
            edges |= {(before, tap) for before in made}
        if node.computed and (found or not node.is_view):
            memory.write(node.out, made | frozenset(found))
    by_first_name = {name: min(names, key=taps.graph_order) for name, names in same.items()}
    return {(by_first_name[a], b) for a, b in edges if by_first_name[a] != by_first_name[b]}


@pytest.fixture(scope="module")
def edges_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], set[Edge]]:
    """`edges_of(arch)`: those of llama.cpp's graph of the architecture's example."""

    def trace(arch: str) -> set[Edge]:
        folder = tmp_path_factory.mktemp(arch)
        source = SynthSource(arch)
        write_checkpoint(folder / "checkpoint", source, config=source.config)
        gguf = folder / "model.gguf"
        checkpoint_to_gguf(Checkpoint(folder / "checkpoint"), gguf)
        with open_gguf(gguf) as artifact:
            tensors = list(artifact.tensors)
        table, settings = table_for(arch), strict_settings(load_engine("native").changed(threads=1))

        def match(node: RecordedNode) -> list[str]:
            return table.match(node.name, node.op, [source.name for source in node.sources if source is not None])

        with Recorder(settings, gguf, [Evaluation(tuple(range(N_TOKENS)))], tensors) as nodes:
            return graph_edges(nodes, match)

    return trace


@pytest.mark.parametrize("arch", GRAPHS)
def test_no_tap_of_the_engine_comes_before_one_that_it_depends_on(
    arch: str, edges_of: Callable[[str], set[Edge]]
) -> None:
    edges = edges_of(arch)
    assert ("blk.0.layer_out", "logits") not in edges  # logits are no node; what comes last is the last norm
    assert ("blk.0.attn_norm", "output_norm") in edges and ("blk.0.layer_out", "blk.1.layer_out") in edges
    assert not misplaced(edges)


def test_a_wrong_order_of_the_engine_is_noticed(
    monkeypatch: pytest.MonkeyPatch, edges_of: Callable[[str], set[Edge]]
) -> None:
    edges = edges_of("llama4")
    monkeypatch.setattr(taps, "_RANK", exchanged("attn_k_rope", "attn_k_rope_norm"))
    assert misplaced(edges) == {("attn_k_rope", "attn_k_rope_norm")}
