"""Every architecture as `synth` makes it, quantized where widths allow: graph and kernel legs agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffharness.pipeline import synthesizing
from diffharness.weights.names import MAPS
from tests.e2e.conftest import Pair
from tests.e2e.runs import NATIVE, whole_run
from tests.oracles.cases import CASES, WIDE

TYPES = ("Q4_K", "Q8_0", "Q6_K")  # in turn
N_TOKENS = 72  # flash attention takes another kernel from 64 tokens on


@pytest.mark.parametrize(("arch", "type_name"), [(arch, TYPES[i % 3]) for i, arch in enumerate(MAPS)])
def test_a_synthetic_model_agrees(arch: str, type_name: str, tmp_path: Path) -> None:
    request = synthesizing.SynthRequest(
        arch, tmp_path, NATIVE, sizes=WIDE, type_name=type_name, n_tokens=N_TOKENS, seed=CASES[arch].seed
    )
    made = synthesizing.run(request)
    assert made.types[type_name] > 2 * made.n_layer, made.narrow
    record = whole_run(Pair(Path(made.gguf), Path(made.checkpoint), Path(made.fixture)), with_checkpoint=True)
    told = [finding.message for finding in record.findings]
    if CASES[arch].engine_differs:
        assert record.verdict.primary == "engine.graph", (record.verdict, told)
        return
    assert record.verdict.primary == "agree", (record.verdict, told)
    graph, kernel = record.legs.graph, record.legs.kernel
    assert (graph.status, kernel.status, record.legs.artifact.status) == ("pass", "pass", "pass")
    assert kernel.nodes_replayed == kernel.nodes_total - kernel.nodes_not_computed > 0
    local = [row.nmse_local for row in graph.taps if row.nmse_local is not None]
    assert len(local) > 5 and max(local) <= CASES[arch].local
