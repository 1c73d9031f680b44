"""`grade` on the embedded model, clean and damaged, and on files that cannot be graded among others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness import kld
from diffharness.captures import Capture, CaptureWriter
from diffharness.engine.crash import EngineCrash
from diffharness.errors import ArtifactFileError, BadInputError, CheckpointError, SettingsError
from diffharness.fixture import from_ids
from diffharness.pipeline import grading, logit_series
from diffharness.pipeline.grade_inputs import GradeRequest, labels
from diffharness.pipeline.logit_series import Places
from diffharness.pipeline.reference_runs import Precision, logits_of
from diffharness.records.base import parse
from diffharness.records.grade import GradeRecord
from diffharness.settings import load_tolerances
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import encode_floats, rewrite_gguf
from tests.e2e.conftest import MakePair
from tests.e2e.conftest import make_pair as make_pair
from tests.e2e.issue_6056 import CHECKPOINT, CLEAN, HELDOUT, damage
from tests.e2e.runs import NATIVE
from tests.oracles.conftest import make_tiny as make_tiny


def request(*models: Path | str, **changes: Any) -> GradeRequest:
    plain: dict[str, Any] = {
        "models": tuple(map(str, models)),
        "engine": NATIVE,
        "tolerances": load_tolerances(),
        "checkpoint": CHECKPOINT,
        "fixture": str(HELDOUT),
        "n_tokens": 600,
        "chunk": 200,
    }
    return GradeRequest(**(plain | changes))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage(tmp_path_factory.mktemp("6056") / "damaged.gguf")


@pytest.fixture(scope="module")
def graded(damaged: Path) -> GradeRecord:
    return grading.grade(request(CLEAN, damaged, "no-such-file.gguf", with_control=True))


def test_clean_and_damaged_are_told_by_their_controls(graded: GradeRecord) -> None:
    clean, bad, _ = graded.rows
    assert clean.control is not None and clean.control.kl_ratio == pytest.approx(1.0) and not clean.control.beyond
    assert bad.control is not None and bad.control.beyond and (bad.control.kl_ratio or 0) > 1000
    assert grading.is_beyond(graded)
    assert clean.statistics is not None and bad.statistics is not None and graded.base is not None
    assert clean.statistics.ppl_base.value == pytest.approx(graded.base.ppl.value)
    assert bad.statistics.ppl.value > 5 * graded.base.ppl.value


def test_llama_cpp_says_the_same(graded: GradeRecord) -> None:
    for row in graded.rows[:2]:
        assert row.ppl is not None and row.engine is not None and row.engine.ppl is not None
        assert row.engine.ppl.value == pytest.approx(row.ppl.value, rel=0.01)
        assert row.engine.kl is not None and row.statistics is not None
        assert row.engine.kl.value == pytest.approx(row.statistics.kl.value, rel=0.5)
    assert graded.engine is not None and graded.engine.version


def test_a_file_that_is_not_there_has_a_row_that_says_so(graded: GradeRecord) -> None:
    missing = graded.rows[2]
    assert missing.error is not None and "no such file" in missing.error
    assert missing.ppl is None and missing.engine is None and missing.statistics is None
    assert grading.has_errors(graded)


def test_the_pair_and_the_curves(graded: GradeRecord) -> None:
    (pair,) = graded.pairs
    assert (pair.a, pair.b) == (CLEAN.name, "damaged.gguf")
    assert pair.nll.told_apart and pair.nll.mean < 0 and pair.kl is not None and pair.kl.told_apart
    assert graded.landmarks == {"the window": 64} and graded.unreached == {"n_ubatch": 512}
    for row in graded.rows[:2]:
        assert [(bucket.start, bucket.stop) for bucket in row.positions] == [(0, 1), (1, 16), (16, 64), (64, 200)]
        assert [bucket.n for bucket in row.positions] == [3, 45, 144, 405]
        assert row.engine is not None and len(row.engine.positions) == len(row.positions)
    assert not [finding for finding in graded.findings if "mean KL" in finding.message]


def test_sizes(graded: GradeRecord) -> None:
    clean = graded.rows[0]
    assert clean.artifact.n_bytes == CLEAN.stat().st_size
    assert clean.bpw is not None and 4.5 < clean.bpw < 5.5


def test_the_record_comes_back(graded: GradeRecord) -> None:
    assert parse(GradeRecord, graded.to_json(), "test") == graded


def test_numbers_are_those_of_whole_logits(graded: GradeRecord) -> None:
    """What was taken up piece by piece is what two whole forwards give."""
    from diffharness.fixture import load_fixture

    fixture = load_fixture(HELDOUT).first(600).rechunked(200)
    with open_gguf(CLEAN) as artifact:
        ours = logits_of(artifact, fixture, Precision())
    theirs = logits_of(Checkpoint(CHECKPOINT), fixture, Precision())
    rows = fixture.scored_positions()
    whole = kld.statistics(kld.series(theirs[rows], ours[rows], fixture.next_ids()))
    found = graded.rows[0].statistics
    assert found is not None and found.n == whole.n == 297
    assert found.kl.value == pytest.approx(whole.kl.value, rel=1e-4)
    assert found.ppl.value == pytest.approx(whole.ppl.value, rel=1e-6)
    assert found.top1 == whole.top1


def test_without_a_base_there_are_perplexities_only(graded: GradeRecord) -> None:
    record = grading.grade(request(CLEAN, checkpoint=None, with_engine=False))
    (row,) = record.rows
    assert record.base is None and row.statistics is None and row.engine is None and record.engine is None
    assert row.ppl == graded.rows[0].ppl
    assert row.positions[-1].kl is None and row.positions[-1].nll == graded.rows[0].positions[-1].nll
    assert record.unreached == {}


def test_against_another_artifact(damaged: Path) -> None:
    record = grading.grade(request(CLEAN, damaged, checkpoint=None, against=str(CLEAN), with_engine=False))
    same, other = (row.statistics for row in record.rows)
    assert record.base is not None and record.base.kind == "artifact" and record.checkpoint is None
    assert same is not None and same.kl.value == 0.0 and same.top1.value == 1.0
    assert other is not None and other.kl.value > 1


def test_an_engine_that_dies_is_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object, **__: object) -> None:
        raise EngineCrash("died with SIGSEGV", kind="signal", signal_name="SIGSEGV")

    monkeypatch.setattr(grading.Engine, "capture", dies)
    record = grading.grade(request(CLEAN, n_tokens=100, chunk=50))
    (row,) = record.rows
    assert row.engine is not None and row.engine.error == "died with SIGSEGV" and row.engine.ppl is None
    assert row.ppl is not None and row.statistics is not None and not grading.has_errors(record)


def test_a_quantizer_that_dies_leaves_no_control(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object, **__: object) -> None:
        raise EngineCrash("ggml does not make it", kind="refused")

    monkeypatch.setattr(grading.Quantizer, "quantize", dies)
    record = grading.grade(request(CLEAN, n_tokens=100, chunk=50, with_engine=False, with_control=True))
    assert record.rows[0].control_error == "ggml does not make it" and record.rows[0].statistics is not None
    assert not grading.is_beyond(record)


def test_what_breaks_past_the_window_shows_by_position(tmp_path: Path) -> None:
    with open_gguf(CLEAN) as source:
        rewrite_gguf(source, tmp_path / "wide.gguf", kv={"gemma4.attention.sliding_window": 128})
    record = grading.grade(request(CLEAN, tmp_path / "wide.gguf", n_tokens=512, chunk=512, with_engine=False))
    clean, wide = (row.positions for row in record.rows)
    for here, there in zip(clean, wide, strict=True):
        assert here.kl is not None and there.kl is not None
        if here.stop <= 64:
            assert there.kl == pytest.approx(here.kl, rel=1e-3)
        else:
            assert there.kl > 20 * here.kl
    (told,) = [finding.message for finding in record.findings if "mean KL" in finding.message]
    assert told.startswith("wide.gguf: mean KL is") and "below position 64" in told


def test_nan_in_an_artifact_is_no_good_number(tmp_path: Path) -> None:
    def poison(info: Any, raw: Any) -> Any:
        if info.name != "output_norm.weight":
            return None
        values = np.full(info.shape, math.nan, dtype=np.float32)
        return "F32", info.shape, encode_floats(values, "F32")

    with open_gguf(CLEAN) as source:
        rewrite_gguf(source, tmp_path / "nan.gguf", tensor=poison)
    record = grading.grade(request(tmp_path / "nan.gguf", CLEAN, n_tokens=200, with_engine=False, with_control=True))
    bad = record.rows[0]
    assert bad.ppl is not None and bad.ppl.value == math.inf and bad.statistics is not None
    assert bad.statistics.top1.value == 0.0 and bad.control is not None and bad.control.beyond
    assert record.pairs[0].nll.told_apart and record.pairs[0].nll.mean == math.inf
    assert parse(GradeRecord, record.to_json(), "test") == record


# -- what cannot be graded ----------------------------------------------------------------------------


def test_another_model_among_them_is_told_in_its_row(make_pair: MakePair) -> None:
    other = make_pair("llama")
    record = grading.grade(request(other.gguf, CLEAN, n_tokens=100, chunk=50, with_engine=False))
    assert record.rows[0].error is not None and "llama" in record.rows[0].error
    assert record.rows[1].statistics is not None
    without = request(CLEAN, other.gguf, checkpoint=None, n_tokens=100, chunk=50, with_engine=False)
    assert "vocabulary of" in (grading.grade(without).rows[1].error or "")


def test_nothing_to_grade_is_an_error(tmp_path: Path, make_pair: MakePair) -> None:
    with pytest.raises(ArtifactFileError, match="no such file"):
        grading.grade(request(tmp_path / "none.gguf"))
    with pytest.raises(CheckpointError):
        grading.grade(request(make_pair("llama").gguf))
    with pytest.raises(BadInputError, match="context"):
        grading.grade(request(CLEAN, n_tokens=None, chunk=9000))


def test_options_that_exclude_or_need_each_other() -> None:
    with pytest.raises(SettingsError, match="found both"):
        grading.grade(request(CLEAN, against=str(CLEAN)))
    with pytest.raises(SettingsError, match="controls"):
        grading.grade(request(CLEAN, checkpoint=None, with_control=True))
    with pytest.raises(SettingsError, match="attention"):
        grading.grade(request(CLEAN, checkpoint=None, with_attention=True))
    with pytest.raises(SettingsError, match="override"):
        grading.grade(request(CLEAN, overrides=("nonsense",)))


def test_attention_is_compared_on_request(damaged: Path) -> None:
    record = grading.grade(
        request(CLEAN, damaged, n_tokens=256, chunk=256, with_engine=False, with_control=True, with_attention=True)
    )
    clean, bad = (row.attention for row in record.rows)
    assert clean is not None and not clean.changed
    assert bad is not None and bad.changed and bad.findings


def test_the_folder_keeps_the_base(tmp_path: Path) -> None:
    grading.grade(request(CLEAN, n_tokens=100, chunk=50, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["reference-base.safetensors"]
    assert Capture(tmp_path / "reference-base.safetensors").taps == ["logits"]


# -- parts --------------------------------------------------------------------------------------------


def test_labels() -> None:
    assert labels(["a/x.gguf", "b/y.gguf"]) == ["x.gguf", "y.gguf"]
    assert labels(["a/x.gguf", "b/x.gguf", "y.gguf"]) == ["a/x.gguf", "b/x.gguf", "y.gguf"]
    assert labels(["x.gguf", "x.gguf"]) == ["x.gguf (1)", "x.gguf (2)"]


def test_places_are_every_row_with_a_token_after_it() -> None:
    places = Places.of(from_ids(list(range(100, 111)), chunk=4))
    assert places.rows.tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert places.next_ids.tolist() == [101, 102, 103, 105, 106, 107, 109, 110]
    assert places.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert places.chunk_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert places.rows[places.scored].tolist() == [2, 6, 9]
    assert [places.within(slice(a, b)) for a, b in ((0, 4), (3, 7), (10, 11))] == [
        slice(0, 3),
        slice(3, 6),
        slice(8, 8),
    ]
    by_hand = Places.of(from_ids(list(range(9)), chunk=4).model_copy(update={"scored": (1, 5)}))
    assert by_hand.rows.tolist() == [1, 5] and by_hand.scored.all()


def test_a_capture_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    fixture = from_ids(rng.integers(0, 30, 40).tolist(), chunk=16)
    places = Places.of(fixture)
    logits = {name: rng.standard_normal((40, 30)).astype(np.float32) for name in ("base", "other")}
    captures = {}
    for name, values in logits.items():
        with CaptureWriter(tmp_path / name, 40) as writer:
            writer.write("logits", 0, values)
        captures[name] = Capture(tmp_path / name)
    monkeypatch.setattr(logit_series, "_PIECE", 7 * 30)
    series = logit_series.of_capture(captures["other"], places, captures["base"])
    whole = kld.series(logits["base"][places.rows], logits["other"][places.rows], places.next_ids)
    np.testing.assert_array_equal(series.kl, whole.kl)
    np.testing.assert_array_equal(series.nll, whole.nll)
    alone = logit_series.of_capture(captures["other"], places, None)
    assert not alone.has_base
    np.testing.assert_array_equal(alone.nll, whole.nll)
