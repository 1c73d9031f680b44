"""Clean pairs come out clean: every architecture and form, every type, to the floors that the design states."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import MakePair
from tests.e2e.runs import graph_only, whole_run
from tests.oracles import tiny, tiny_gemma

TYPES = ("F32", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS")
DIFFERS = tiny.ENGINE_DIFFERS | tiny_gemma.ENGINE_DIFFERS
CASES = [case for case in (*tiny.CASES, *tiny_gemma.CASES) if case not in DIFFERS]
ONE_OF_EACH = [
    "llama",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3moe",
    "gemma2",
    "gemma3",
    "gemma4",
    "gemma4-experts",
    "gemma4-e",
]

LOCAL = 1e-8  # every tap, with the GELU convention where there is a GELU
LOGITS_WITHOUT_GELU = 1e-9
LOGITS_AS_DEFINED, LOGITS_WITH_CONVENTION = 1e-4, 1e-5


def check_clean(make_pair: MakePair, case: str, type_name: str, folder: Path) -> None:
    runs = graph_only(make_pair(case, type_name), folder)
    final = runs.conventions or runs.definition
    assert final.ok, [(row.tap, row.nmse_local, row.worst_token_nmse) for row in final.failing]
    assert final.complete and len(final.judged) > 20
    assert max(row.nmse_local for row in final.judged if row.nmse_local is not None) <= LOCAL
    assert runs.definition.logits is not None and final.logits is not None
    if case.startswith("gemma"):
        assert runs.conventions is not None, "a GELU is there, and as defined it is not ggml's"
        assert runs.definition.logits.nmse <= LOGITS_AS_DEFINED
        assert final.logits.nmse <= LOGITS_WITH_CONVENTION
    else:
        assert runs.definition.logits.nmse <= LOGITS_WITHOUT_GELU


@pytest.mark.parametrize("case", CASES)
def test_graph_agrees_on_every_form(make_pair: MakePair, case: str, tmp_path: Path) -> None:
    check_clean(make_pair, case, "F32", tmp_path)


@pytest.mark.parametrize("case", ONE_OF_EACH)
@pytest.mark.parametrize("type_name", TYPES[1:])
def test_graph_agrees_on_every_type(make_pair: MakePair, case: str, type_name: str, tmp_path: Path) -> None:
    check_clean(make_pair, case, type_name, tmp_path)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_whole_run_agrees(make_pair: MakePair, case: str) -> None:
    record = whole_run(make_pair(case, "Q8_0"), with_checkpoint=True)
    assert record.verdict.primary == "agree", (record.verdict, [f.message for f in record.findings])
    legs = record.legs
    assert (legs.graph.status, legs.settings.status, legs.artifact.status) == ("pass", "pass", "pass")
    assert legs.kernel.status == "pass" and legs.kernel.logits is not None
    assert legs.kernel.nodes_replayed == legs.kernel.nodes_total - legs.kernel.nodes_not_computed > 0
    assert record.first_divergence is None
    assert {"artifact", "checkpoint", "control"} <= set(record.scores.reference)
    assert set(record.scores.engine) == {"native", "strict"}


@pytest.mark.parametrize("case", sorted(set(DIFFERS) - {"qwen3-biases", "gemma2-scale", "gemma3-scale"}))
def test_what_the_engine_computes_otherwise_is_its_graph(make_pair: MakePair, case: str) -> None:
    """Models that llama.cpp does not compute as they are defined: a true verdict, not a false one."""
    record = whole_run(make_pair(case))
    assert record.verdict.primary == "engine.graph", record.verdict
    assert record.first_divergence is not None and record.first_divergence.layer is not None
