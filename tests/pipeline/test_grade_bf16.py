"""`grade --matmul bf16`: its noise is measured, what is within it is said to be, and nothing is judged by it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffharness import kld
from diffharness.engine.runner import Engine
from diffharness.errors import SettingsError
from diffharness.fixture import from_ids, load_fixture
from diffharness.metrics import nmse
from diffharness.paired import paired
from diffharness.pipeline import grade_bf16, grading
from diffharness.pipeline.grade_bf16 import Bf16Precision, first_rows, marked, measured
from diffharness.pipeline.reference_runs import Precision
from diffharness.pipeline.request import RunRequest
from diffharness.records.base import parse
from diffharness.records.grade import Bf16Noise, GradeRecord, PositionBucket
from diffharness.reference.bf16 import Bf16Forward
from diffharness.reference.runner import Reference
from diffharness.settings import load_tolerances
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from tests.e2e.issue_6056 import CHECKPOINT, CLEAN, HELDOUT, damage
from tests.e2e.runs import NATIVE
from tests.pipeline.test_grading import request

FEW: dict[str, Any] = {"n_tokens": 400, "chunk": 200, "with_engine": False}
TYPES = ("Q6_K", "Q8_0")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint as it is, in three fine types, and damaged."""
    folder = tmp_path_factory.mktemp("bf16")
    checkpoint = Checkpoint(CHECKPOINT)
    made = {name: folder / f"{name}.gguf" for name in ("plain", "F16")} | {"damaged": damage(folder / "damaged.gguf")}
    checkpoint_to_gguf(checkpoint, made["plain"])
    checkpoint_to_gguf(checkpoint, made["F16"], type_name="F16")
    matrices = [name for name, info in checkpoint.tensors.items() if len(info.shape) > 1]
    for name in TYPES:
        made[name] = folder / f"{name}.gguf"
        Engine(NATIVE).quantize_like(made["plain"], made[name], dict.fromkeys(matrices, name))
    return made


@pytest.fixture(scope="module")
def coarse(models: dict[str, Path]) -> GradeRecord:
    return grading.grade(request(*models.values(), matmul="bf16", **FEW))


@pytest.fixture(scope="module")
def exact(models: dict[str, Path]) -> GradeRecord:
    return grading.grade(request(*models.values(), **FEW))


def noise(record: GradeRecord) -> Bf16Noise:
    assert record.bf16 is not None
    return record.bf16


def kl(record: GradeRecord) -> dict[str, float]:
    return {row.label: row.statistics.kl.value for row in record.rows if row.statistics is not None}


def test_the_noise_is_that_of_two_forwards(coarse: GradeRecord) -> None:
    checkpoint, ids = Checkpoint(CHECKPOINT), load_fixture(HELDOUT).first(400).rechunked(200)
    chunk = [ids.chunks()[0][:64]]
    plain, rounded = Reference(checkpoint).run(chunk), Bf16Forward(checkpoint).run(chunk)
    assert plain is not None and rounded is not None
    found = noise(coarse)
    next_ids = np.array(ids.ids[1:65])
    expected = kld.statistics(kld.series(plain.numpy(), rounded.numpy(), next_ids))
    assert found.label == checkpoint.label and found.statistics.n == 64
    assert found.nmse == pytest.approx(nmse(rounded.numpy(), plain.numpy()), rel=0.3)  # another number of rows at once
    assert found.statistics.kl.value == pytest.approx(expected.kl.value, rel=0.3)
    assert found.limit == 2 * found.statistics.kl.value > 1e-6


def test_without_it_nothing_is_said_of_noise(exact: GradeRecord) -> None:
    assert exact.bf16 is None
    assert all(row.within_noise is None for row in exact.rows)
    assert not any(pair.nll.within_noise or (pair.kl and pair.kl.within_noise) for pair in exact.pairs)


def test_what_is_within_the_noise_is_marked(coarse: GradeRecord, exact: GradeRecord) -> None:
    """The checkpoint in full precision and in F16 cannot be ranked, a damaged file can."""
    within = {row.label: row.within_noise for row in coarse.rows}
    assert within["plain.gguf"] and within["F16.gguf"] and not within["Q6_K.gguf"] and not within["damaged.gguf"]
    pairs = {frozenset((pair.a, pair.b)): pair for pair in coarse.pairs}
    near = pairs[frozenset(("plain.gguf", "F16.gguf"))]
    assert near.kl is not None and near.kl.within_noise and not near.kl.told_apart
    far = pairs[frozenset(("Q8_0.gguf", "damaged.gguf"))]
    assert far.kl is not None and far.kl.told_apart and not far.kl.within_noise and far.nll.told_apart


def test_numbers_are_those_of_float32_give_or_take_the_noise(coarse: GradeRecord, exact: GradeRecord) -> None:
    limit, fine = noise(coarse).limit, kl(exact)
    for label, value in kl(coarse).items():
        assert value == pytest.approx(fine[label], abs=limit, rel=0.05), label
    for mine, theirs in zip(coarse.rows, exact.rows, strict=True):
        assert mine.ppl is not None and theirs.ppl is not None and mine.ppl != theirs.ppl
        assert mine.ppl.value == pytest.approx(theirs.ppl.value, rel=0.01)


def test_the_record_comes_back(coarse: GradeRecord) -> None:
    assert parse(GradeRecord, coarse.to_json(), "test") == coarse


def test_without_a_base_the_first_artifact_tells_the_noise() -> None:
    record = grading.grade(request("no-such.gguf", CLEAN, checkpoint=None, matmul="bf16", **FEW))
    assert noise(record).label == CLEAN.name and 0 < noise(record).limit < 0.01
    assert record.rows[1].within_noise is None and record.rows[1].ppl is not None


def test_llama_cpps_own_numbers_are_marked_too(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its KL is from logits of the base that are rounded as well."""
    few = FEW | {"n_tokens": 100, "chunk": 50, "with_engine": True}
    (row,) = grading.grade(request(models["plain"], matmul="bf16", **few)).rows
    assert row.engine is not None and row.engine.kl is not None and row.engine.within_noise is not None
    record = grading.grade(request(models["damaged"], matmul="bf16", **few))
    assert record.rows[0].engine is not None and record.rows[0].engine.within_noise is False


def test_growth_within_the_noise_is_no_finding() -> None:
    curve = [
        PositionBucket(start=1, stop=16, n=15, nll=2.0, kl=1e-7),
        PositionBucket(start=16, stop=64, n=48, nll=2.0, kl=2e-4),
    ]
    row = SimpleNamespace(label="x", positions=curve, engine=None)
    floors = load_tolerances()
    stats = kld.statistics(kld.series(np.eye(20, dtype=np.float32), np.eye(20, dtype=np.float32), np.arange(20)))
    found = Bf16Noise(label="x", nmse=1e-5, statistics=stats, limit=1e-3, supported=None)
    assert len(grading._findings([row], floors, None)) == 1  # type: ignore[list-item]
    assert not grading._findings([row], floors, found)  # type: ignore[list-item]


def test_pairs_and_rows() -> None:
    stats = kld.statistics(kld.series(np.eye(20, dtype=np.float32), np.eye(20, dtype=np.float32), np.arange(20)))
    found = Bf16Noise(label="x", nmse=1e-5, statistics=stats, limit=1e-2, supported=None)
    zero, chunks = np.zeros(512), np.repeat([0, 1], 256)
    tiny, large, broken = (paired(zero + by, zero, chunks) for by in (1e-3, -1e-1, np.inf))
    assert tiny.told_apart and not marked(tiny, found).told_apart and marked(tiny, found).within_noise
    assert marked(large, found) == large and marked(broken, found) == broken and broken.told_apart
    ids = [np.arange(5), np.arange(5), np.arange(3)]
    assert [len(chunk) for chunk in first_rows(ids, 7)] == [5, 2]
    assert [len(chunk) for chunk in first_rows(ids, 5)] == [5] and [len(c) for c in first_rows(ids, 13)] == [5, 5, 3]


def test_few_tokens_are_enough_to_measure() -> None:
    with open_gguf(CLEAN) as artifact:
        found = measured(artifact, from_ids([5, 6, 7], chunk=3), Bf16Precision(), None)
    assert found.statistics.n == 2 and found.statistics.kl.error is None


@pytest.mark.parametrize(
    ("flags", "supported"),
    [(("avx2", "avx512f"), False), (("avx2", "avx512_bf16"), True), (("avx2", "amx_bf16"), True), (("sve2",), None)],
)
def test_what_the_processor_has(flags: tuple[str, ...], supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grade_bf16, "this_machine", lambda: SimpleNamespace(flags=flags))
    assert grade_bf16._supported("cpu") is supported and grade_bf16._supported("cuda") is None


# -- never where something is judged -------------------------------------------------------------------


def test_what_asks_for_exactness_is_refused() -> None:
    with pytest.raises(SettingsError, match="control"):
        grading.grade(request(CLEAN, matmul="bf16", with_control=True))
    with pytest.raises(SettingsError, match="float64"):
        grading.grade(request(CLEAN, matmul="bf16", dtype="float64"))


def test_no_run_can_be_asked_for_it() -> None:
    assert "matmul" not in {field.name for field in fields(RunRequest)}
    with pytest.raises(TypeError, match="matmul"):
        RunRequest(CLEAN, NATIVE, load_tolerances(), matmul="bf16")  # type: ignore[call-arg]


def test_passes_against_an_engine_are_in_float32_whatever_they_are_given() -> None:
    """They make a reference of their own, of which only dtype and device are asked."""
    from diffharness.pipeline.reference_runs import logits_of

    ids = load_fixture(HELDOUT).first(40)
    with open_gguf(CLEAN) as artifact:
        np.testing.assert_array_equal(logits_of(artifact, ids, Bf16Precision()), logits_of(artifact, ids, Precision()))
        assert isinstance(Bf16Precision().forward(artifact), Bf16Forward)
        assert isinstance(Precision().forward(artifact), Reference)
