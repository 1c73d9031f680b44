"""The embedded model as a user would run it: the clean artifact, and one damaged as in unsloth #6056."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffharness.records import RunRecord
from tests.e2e.conftest import Pair
from tests.e2e.issue_6056 import CHECKPOINT, CLEAN, HELDOUT, PERIOD, SPARED, damage, is_hit
from tests.e2e.runs import whole_run


@pytest.fixture(scope="module")
def clean() -> RunRecord:
    return whole_run(Pair(CLEAN, CHECKPOINT, HELDOUT), with_checkpoint=True, n_tokens=1024)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    gguf = damage(tmp_path_factory.mktemp("6056") / "damaged-Q4_K_M.gguf")
    return whole_run(Pair(gguf, CHECKPOINT, HELDOUT), with_checkpoint=True, n_tokens=1024)


def test_the_clean_artifact_agrees(clean: RunRecord) -> None:
    assert clean.verdict.primary == "agree", clean.verdict
    statuses = {name: clean.legs.get(name).status for name in ("tokens", "graph", "settings", "artifact")}
    assert statuses == dict.fromkeys(statuses, "pass")
    scores = clean.scores.reference
    assert scores["checkpoint"].ppl < 6 and scores["artifact"].ppl == pytest.approx(scores["checkpoint"].ppl, rel=0.02)
    assert clean.scores.engine["strict"].ppl == pytest.approx(scores["artifact"].ppl, rel=1e-4)
    assert not [row.name for row in clean.legs.artifact.tensors if row.damaged]


def test_the_damaged_artifact_is_convicted_and_the_engine_cleared(damaged: RunRecord) -> None:
    assert damaged.verdict.all == ["artifact.weights"], damaged.verdict
    assert damaged.legs.graph.status == "pass" and damaged.legs.artifact.status == "fail"
    scores = damaged.scores.reference
    assert scores["artifact"].ppl > 5 * scores["checkpoint"].ppl  # measured: 20.2 against 2.26
    assert scores["control"].ppl == pytest.approx(scores["checkpoint"].ppl, rel=0.02)


def test_the_touched_tensors_are_named_and_no_other(damaged: RunRecord) -> None:
    rows = damaged.legs.artifact.tensors
    matrices = {row.name for row in rows if row.damaged and not row.name.endswith("layer_output_scale.weight")}
    assert matrices == {row.name for row in rows if row.cos is not None and row.cos < 0.9 and row.name in matrices}
    hit = {row.name for row in rows if is_hit(row.name, 2 if row.type != "F32" else 1)}
    assert {row.name for row in rows if row.damaged} == hit
    layers = {row.layer for row in rows if row.name in matrices}
    assert layers == {il for il in range(12) if il % PERIOD not in SPARED}


def test_the_record_survives_a_round_trip(damaged: RunRecord, tmp_path: Path) -> None:
    from diffharness.records import load_record

    (tmp_path / "run.json").write_text(damaged.to_json())
    assert load_record(tmp_path) == damaged
