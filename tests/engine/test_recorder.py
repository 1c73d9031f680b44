"""Recorded nodes are the engine's: complete, with inputs as they were before, and gone with the worker when it ends."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness.engine import process, recording
from diffharness.engine.bindings import GgmlTensor
from diffharness.engine.crash import EngineCrash
from diffharness.engine.recorder import Evaluation, Recorder, one_by_one, schedule
from diffharness.engine.runner import Engine
from diffharness.errors import FixtureError, SettingsError
from diffharness.recorded import RecordedNode
from diffharness.settings import EngineSettings
from diffharness.weights.gguf_file import open_gguf

from .conftest import N_VOCAB, MakeGguf
from .planted import planted_python


def recorder(settings: EngineSettings, model: Path, evaluations: list[Evaluation], **more: Any) -> Recorder:
    with open_gguf(model) as artifact:
        return Recorder(settings, model, evaluations, list(artifact.tensors), **more)


def array(node: RecordedNode, i: int) -> np.ndarray[Any, Any]:
    source = node.sources[i]
    assert source is not None
    return source.array()


def check_sum(node: RecordedNode) -> None:
    np.testing.assert_array_equal(node.out.array(), array(node, 0) + array(node, 1), err_msg=node.name)


def test_every_node_comes_with_its_inputs_as_they_were(
    quick: EngineSettings, llama_gguf: Path, ids: list[int], tmp_path: Path
) -> None:
    n_nodes = Engine(quick).capture(llama_gguf, [ids[:20]], tmp_path / "c", trace=True).n_nodes
    overwritten, sums, by_path = 0, 0, Counter[str]()
    with recorder(quick, llama_gguf, schedule(ids, 20, 2)) as nodes:
        for node in nodes:
            by_path[node.path] += 1
            weights = [source for source in node.sources if source is not None and source.is_weight]
            assert all(weight.name.endswith(".weight") for weight in weights)
            if node.op == "ADD":
                check_sum(node)
                sums += 1
                overwritten += any(each.address == node.out.address for each in node.sources if each is not None)
            if node.op == "MUL_MAT" and weights:
                assert node.sources[0] == weights[0]
                assert node.out.shape[2] == (20 if node.path == "batch" else 1)
            assert node.computed and node.on_host
    assert by_path == {"single": 2 * n_nodes, "batch": n_nodes}
    assert sums == 3 * 4 and overwritten > 0, "no node worked in place: this test says nothing"


def test_order_names_and_rows(quick: EngineSettings, llama_gguf: Path, ids: list[int]) -> None:
    with recorder(quick, llama_gguf, schedule(ids, 12, 2)) as recorded:
        nodes = [(n.evaluation, n.index, n.name, n.op, n.occurrence, n.row, n.n_tokens) for n in recorded]
    assert sorted(nodes) == nodes  # the order of evaluation
    assert {(each[0], each[5], each[6]) for each in nodes} == {(1, 12, 1), (2, 13, 1), (3, 0, 12)}
    keys = Counter((each[0], *each[2:5]) for each in nodes)
    assert max(keys.values()) == 1  # name, op and occurrence tell the nodes of a graph apart
    assert max(each[4] for each in nodes) >= 1


def test_micro_batches_are_graphs_of_their_own(quick: EngineSettings, llama_gguf: Path, ids: list[int]) -> None:
    settings = quick.changed(n_ubatch=8)
    with recorder(settings, llama_gguf, [Evaluation(tuple(ids[:17]))]) as recorded:
        graphs = Counter((node.graph, node.row, node.n_tokens, node.path) for node in recorded)
    assert sorted(graphs) == [(0, 0, 8, "batch"), (1, 8, 8, "batch"), (2, 16, 1, "single")]
    assert len(set(graphs.values())) == 1


def test_views_come_without_bytes(quick: EngineSettings, llama_gguf: Path, ids: list[int]) -> None:
    with recorder(quick, llama_gguf, [Evaluation(tuple(ids[:5]))]) as recorded:
        views = [node for node in recorded if node.is_view]
    assert {node.op for node in views} >= {"VIEW", "RESHAPE", "PERMUTE"}
    assert all(node.out.raw is not None and node.out.raw.size == 0 and node.out.address for node in views)


def test_large_nodes_grow_the_shared_memory(quick: EngineSettings, make_gguf: MakeGguf) -> None:
    width, tokens = 60_000, tuple(int(i) for i in np.random.default_rng(0).integers(0, N_VOCAB, 96))
    with recorder(quick, make_gguf(intermediate_size=width), [Evaluation(tokens)]) as recorded:
        found = {node.name: (node.out.raw.size, node.out.array()[0, 0, -1, -1]) for node in recorded if wide(node)}
    assert set(found) == {f"{name}-{layer}" for name in ("ffn_gate", "ffn_up", "ffn_swiglu") for layer in (0, 1)}
    assert all(size == 4 * 96 * width and last != 0.0 for size, last in found.values())


def wide(node: RecordedNode) -> bool:
    return node.out.shape[-1] >= 60_000


def test_only_some(quick: EngineSettings, llama_gguf: Path, ids: list[int]) -> None:
    with recorder(quick, llama_gguf, one_by_one(ids[:4]), only=["l_out-1", "ffn_out-0"]) as recorded:
        found = [(node.name, node.evaluation) for node in recorded]
    assert found == [(name, i) for i in range(4) for name in ("ffn_out-0", "l_out-1")]


def test_leaving_early_ends_the_worker(quick: EngineSettings, llama_gguf: Path, ids: list[int]) -> None:
    with recorder(quick, llama_gguf, schedule(ids, 12)) as recorded:
        next(iter(recorded))
        pid = recorded._dialogue._worker.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    recorded.close()


def test_what_the_engine_refuses(quick: EngineSettings, llama_gguf: Path, ids: list[int], tmp_path: Path) -> None:
    with recorder(quick, llama_gguf, [Evaluation((1, N_VOCAB))]) as recorded, pytest.raises(FixtureError):
        list(recorded)
    (tmp_path / "broken.gguf").write_bytes(llama_gguf.read_bytes()[:3000])
    evaluations = schedule(ids, 4)
    with Recorder(quick, tmp_path / "broken.gguf", evaluations, []) as broken, pytest.raises(EngineCrash) as caught:
        list(broken)
    assert caught.value.kind == "refused"
    with pytest.raises(SettingsError):
        Recorder(quick, llama_gguf, evaluations, [], overrides=["nonsense"])


@pytest.mark.parametrize(("action", "kind"), [("SIGILL", "signal"), ("abort", "abort"), ("exit3", "exit")])
def test_a_death_names_its_node(
    quick: EngineSettings, llama_gguf: Path, ids: list[int], tmp_path: Path, action: str, kind: str
) -> None:
    settings = quick.changed(python=planted_python(tmp_path / "bin", action))
    with recorder(settings, llama_gguf, schedule(ids, 8)) as recorded, pytest.raises(EngineCrash) as caught:
        list(recorded)
    assert (caught.value.kind, caught.value.node["node"]) == (kind, "ffn_norm-1")


def test_a_hang_ends(quick: EngineSettings, llama_gguf: Path, ids: list[int], tmp_path: Path) -> None:
    settings = quick.changed(python=planted_python(tmp_path / "bin", "hang"), time_limit_s=5)
    with recorder(settings, llama_gguf, schedule(ids, 8)) as recorded, pytest.raises(EngineCrash) as caught:
        list(recorded)
    assert caught.value.kind == "hang"


@pytest.mark.parametrize(("own", "told"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_engine_s_threads_sleep_while_this_process_works(
    quick: EngineSettings, llama_gguf: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch, own: str | None, told: str
) -> None:
    environments: list[dict[str, str]] = []

    def popen(*_: object, env: dict[str, str], **__: object) -> None:
        environments.append(env)
        raise FileNotFoundError(2, "no such file")

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    monkeypatch.setattr(process.subprocess, "Popen", popen)
    with pytest.raises(EngineCrash):
        recorder(quick, llama_gguf, schedule(ids, 4))
    with pytest.raises(EngineCrash):
        Engine(quick).info()
    assert [env.get("OMP_WAIT_POLICY") for env in environments] == [told, own]


def test_schedules() -> None:
    tokens = list(range(10))
    prompt, one, two, batch = schedule(tokens, 6, 2)
    assert (prompt.on, batch.on, prompt.tokens, batch.clear) == (False, True, batch.tokens, True)
    assert [(one.tokens, one.start, one.clear), (two.tokens, two.start)] == [((6,), 6, False), ((7,), 7)]
    assert schedule(tokens, 64, 2)[-1].tokens == tuple(range(8))
    assert schedule(tokens, 64, 0) == [Evaluation(tuple(tokens))]
    assert [len(each.tokens) for each in schedule([1, 2], 64, 2)] == [2]
    assert [each.tokens for each in one_by_one([5, 6])] == [(5,), (6,)] and one_by_one([5, 6])[0].clear
    with pytest.raises(FixtureError, match="at least 2"):
        schedule([1], 64)


def test_the_destination_of_rows_that_are_set_is_always_a_source() -> None:
    """Builds before 2026 leave it out of the node's sources."""
    node = GgmlTensor()
    node.src[0], node.src[1] = 16, 32
    assert recording._sources(48, node, "SET_ROWS")[:4] == [16, 32, 48, None]
    assert recording._sources(48, node, "ROPE")[:3] == [16, 32, None]
    node.src[2] = 64
    assert recording._sources(48, node, "SET_ROWS")[2] == 64
