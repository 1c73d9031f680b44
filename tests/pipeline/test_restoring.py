"""`restore` on the embedded model: ladders, search, and each verdict on a file that deserves it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness.errors import BadInputError, EngineError
from diffharness.pipeline.restoring import RestoreRequest, restore
from diffharness.records import load
from diffharness.records.restore import GroupScore, RestoreRecord
from diffharness.settings import load_tolerances
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import rewrite_gguf
from tests.e2e.issue_6056 import damage
from tests.pipeline.embedded_variants import (
    CHECKPOINT,
    CLEAN,
    HELDOUT,
    NATIVE,
    Change,
    noise,
    other_basis,
    trained,
    variant,
)

TOKENS = 512  # 255 scored positions


def run(model: Path, **changes: Any) -> RestoreRecord:
    request: dict[str, Any] = {
        "model": model,
        "checkpoint": CHECKPOINT,
        "engine": NATIVE,
        "tolerances": load_tolerances(),
        "fixture": str(HELDOUT),
        "n_tokens": TOKENS,
    }
    return restore(RestoreRequest(**(request | changes)))


def rungs(record: RestoreRecord, into: str) -> dict[str, GroupScore]:
    return {row.group: row for row in record.groups if row.into == into}


# -- the clean file ------------------------------------------------------------------------------------


def test_the_clean_artifact_agrees(tmp_path: Path) -> None:
    said: list[str] = []
    record = run(CLEAN, say=said.append)
    assert record.verdict.primary == "agree" and record.verdict.all == ["agree"], record.verdict
    assert {row.told for row in record.groups} == {"same"} and {row.into for row in record.groups} == {"artifact"}
    assert rungs(record, "artifact")["norms"].change == 0.0, "equal on both sides"
    assert record.scores["artifact"].ppl == pytest.approx(record.scores["control"].ppl, rel=1e-3)
    assert record.scores["checkpoint"].kl_mean == 0.0
    assert said[0].startswith("comparing tensors") and said[1] == "forward 1 of 14: the checkpoint"
    path = tmp_path / "record.json"
    path.write_text(record.to_json())
    assert load(RestoreRecord, path) == record


def test_too_few_tokens_decide_nothing() -> None:
    record = run(CLEAN, n_tokens=64, tensors=("blk.*.attn_q.weight",))
    assert record.verdict.primary == "inconclusive" and "--tokens" in (record.verdict.next_step or "")
    assert "31 scored positions are too few" in record.verdict.summary
    assert record.verdict.next_step is not None and "--tokens 2048" in record.verdict.next_step


def test_without_a_control_nothing_clears_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: object) -> None:
        raise EngineError("the quantizer died")

    monkeypatch.setattr("diffharness.engine.quantizer.Quantizer.quantize", dead)
    said: list[str] = []
    record = run(CLEAN, tensors=("blk.*.attn_q.weight",), say=said.append)
    assert record.verdict.primary == "inconclusive" and "no control" in record.verdict.summary
    assert "no control: the quantizer died" in said and "control" not in record.scores


# -- damage --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage(tmp_path_factory.mktemp("6056") / "damaged.gguf")


def test_issue_6056_in_both_directions(damaged: Path) -> None:
    record = run(damaged)
    assert record.verdict.all == ["artifact.weights"], record.verdict
    assert "ffn_down in only layers with number mod 6 in {2, 3, 4, 5}" in record.verdict.summary
    assert "layer_output_scale in all layers" in record.verdict.summary
    restored, harm = rungs(record, "artifact"), rungs(record, "checkpoint")
    artifact, checkpoint = record.scores["artifact"].ppl, record.scores["checkpoint"].ppl
    assert restored["ffn_down"].ppl < 0.6 * artifact and restored["ffn_down"].told == "better"
    assert restored["layer_output_scale"].ppl != artifact and harm["layer_output_scale"].ppl > 1.05 * checkpoint
    assert harm["ffn_down"].told == "worse" and harm["ffn_down"].ppl > 1.1 * checkpoint
    assert (restored["ffn_down"].drifted, restored["norms"].drifted) == (8, 0)
    assert [row.ppl for row in record.groups if row.into == "artifact"] == sorted(r.ppl for r in restored.values())
    assert any(f.message.startswith("restoring only ffn_down: ") for f in record.findings)
    assert record.lineage is not None and not record.lineage.spread
    assert record.verdict.next_step is not None and record.verdict.next_step.endswith("--search")


def test_search_finds_the_two_damaged_tensors(tmp_path: Path) -> None:
    hit = {"blk.3.ffn_down.weight", "blk.4.ffn_down.weight", "blk.8.attn_q.weight"}
    broken = variant(tmp_path / "broken.gguf", noise(2.0, hit.__contains__))
    record = run(broken, search=True, within=0.005)
    assert record.verdict.primary == "artifact.weights" and record.groups == []
    found = record.search
    assert found is not None and found.reached and found.minimal and found.finest
    assert set(found.tensors) <= hit and {"blk.3.ffn_down.weight", "blk.4.ffn_down.weight"} <= set(found.tensors)
    assert found.score is not None and found.score.ppl <= 1.005 * found.target
    assert "ffn_down in only sliding layers, of them 3, 4" in found.words and found.forwards <= found.budget


def test_search_within_its_budget(damaged: Path) -> None:
    record = run(damaged, search=True, budget=4)
    found = record.search
    assert found is not None and found.reached and not found.minimal and found.forwards <= 4
    assert found.score is not None and found.score.ppl <= 1.01 * found.target
    assert record.forwards <= 4 + 3


def test_search_where_nothing_needs_to_be_put_back() -> None:
    record = run(CLEAN, search=True)
    assert record.search is not None and record.search.words == "nothing" and record.search.minimal
    assert record.verdict.primary == "agree"


def test_noise_all_over_is_damage(tmp_path: Path) -> None:
    """It differs everywhere alike, as another model does; but its parts add up."""
    record = run(variant(tmp_path / "noise.gguf", noise(0.2)))
    assert record.verdict.all == ["artifact.weights"], record.verdict
    assert record.lineage is not None and record.lineage.spread and record.lineage.mark is None
    assert record.lineage.additivity == pytest.approx(1.0, abs=0.25)


def test_nan_is_the_files_fault(tmp_path: Path) -> None:
    name, out = "blk.1.ffn_up.weight", tmp_path / "nan.gguf"
    with open_gguf(CLEAN) as source:

        def tensor(info: Any, raw: Any) -> Any:
            if info.name != name:
                return None
            values = source.read(name).copy()
            values[3, 7] = np.nan
            return "F32", info.shape, values.view(np.uint8)

        rewrite_gguf(source, out, tensor=tensor)
    record = run(out, tensors=(name, "blk.*.attn_q.weight"))
    assert record.verdict.primary == "artifact.file" and name in record.verdict.summary
    assert math.isinf(record.scores["artifact"].ppl)
    restored = rungs(record, "artifact")[name]
    assert restored.told == "better" and restored.ppl < 3


# -- metadata ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rekeyed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rekeyed") / "rekeyed.gguf"
    with open_gguf(CLEAN) as source:
        rewrite_gguf(source, out, kv={"gemma4.rope.freq_base_swa": 500.0})
    return out


def test_a_wrong_key_is_named_and_repaired(rekeyed: Path) -> None:
    record = run(rekeyed)
    assert record.verdict.all == ["artifact.metadata"], record.verdict
    assert "gemma4.rope.freq_base_swa is 500.0, by the checkpoint's config 10000.0" in record.verdict.summary
    row = record.groups[0]
    assert row.keys == ["gemma4.rope.freq_base_swa"] and row.told == "better"
    assert row.ppl == pytest.approx(record.scores["control"].ppl, rel=1e-3)
    assert record.metadata[0].repaired_ppl == row.ppl


def test_search_puts_the_key_back(rekeyed: Path) -> None:
    found = run(rekeyed, search=True).search
    assert found is not None and found.minimal and (found.keys, found.tensors) == (["gemma4.rope.freq_base_swa"], [])
    assert found.words == "gemma4.rope.freq_base_swa"


# -- lineage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "mark"), [(lambda: trained(2, 4e-4), "coherent"), (other_basis, "misfit")], ids=["trained", "basis"]
)
def test_another_model(tmp_path: Path, change: Any, mark: str) -> None:
    made: Change = change()
    record = run(variant(tmp_path / "other.gguf", made))
    assert record.verdict.all == ["artifact.lineage"], (record.verdict, record.lineage)
    assert record.verdict.summary.startswith("a sound model, but not made from this checkpoint")
    assert record.lineage is not None and record.lineage.mark == mark
    assert "--checkpoint" in (record.verdict.next_step or "")


# -- groups --------------------------------------------------------------------------------------------


def test_what_is_exchanged_can_be_chosen(damaged: Path) -> None:
    record = run(damaged, layers=("0-5", "6-11"), tensors=("*.layer_output_scale.weight",))
    assert set(rungs(record, "artifact")) == {"layers 0-5", "layers 6-11", "*.layer_output_scale.weight"}
    record = run(CLEAN, by="block", into="checkpoint")
    harm = rungs(record, "checkpoint")
    assert list(rungs(record, "artifact")) == []
    assert {"layers 0, 1", "layers 10, 11", "embedding"} <= set(harm)
    assert record.layers_run < 0.8 * 12 * record.forwards, "later blocks start later"


def test_by_layer_within_a_glob(damaged: Path) -> None:
    record = run(damaged, by="layer", tensors=("blk.*.ffn_down.weight",), layers=("3-4",))
    rows = rungs(record, "artifact")
    assert set(rows) == {f"layer {il}" for il in range(12)}
    assert rows["layer 3"].tensors != rows["layer 5"].tensors == ["blk.5.ffn_down.weight"]
    assert rows["layer 1"].drifted == 0 and rows["layer 3"].drifted > 5


@pytest.mark.parametrize("more", [{"layers": ("12",)}, {"tensors": ("blk.*.nothing",)}, {"layers": ("x",)}])
def test_groups_that_are_none(more: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match="expected"):
        run(CLEAN, **more)
