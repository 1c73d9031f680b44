"""SmolLM2 requantized: `grade` ranks the types as they are, its controls clear them, and llama.cpp says the same."""

from __future__ import annotations

import pytest

from bench.model import smollm2, smollm2_checkpoint
from diffharness.engine.runner import Engine
from diffharness.pipeline.grade_inputs import GradeRequest
from diffharness.pipeline.grading import grade, has_errors, is_beyond
from diffharness.records.grade import GradeRecord
from diffharness.settings import load_engine, load_tolerances
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import write_gguf

pytestmark = [pytest.mark.real, pytest.mark.slow]

FTYPES = ("Q8_0", "Q4_K_M", "Q2_K")


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> GradeRecord:
    folder, engine = tmp_path_factory.mktemp("smollm2"), load_engine("native")
    plain = folder / "f32.gguf"
    with open_gguf(smollm2()) as artifact:
        write_gguf(plain, artifact, type_of=lambda info: "F32", kv_from=artifact)
    models = [Engine(engine).quantize(plain, folder / f"{ftype}.gguf", ftype) for ftype in FTYPES]
    return grade(
        GradeRequest(
            models=tuple(map(str, models)),
            engine=engine,
            tolerances=load_tolerances(),
            checkpoint=smollm2_checkpoint(),
            with_control=True,
        )
    )


def test_types_rank_as_they_are(graded: GradeRecord) -> None:
    assert not has_errors(graded)
    found = [row.statistics for row in graded.rows]
    assert all(stats is not None for stats in found)
    kl = [stats.kl.value for stats in found if stats is not None]
    assert kl == sorted(kl) and kl[0] < 0.005 and kl[1] < 0.1 < kl[2]  # measured: 1e-3, 0.06, 0.7
    top1 = [stats.top1.value for stats in found if stats is not None]
    assert top1 == sorted(top1, reverse=True) and top1[0] > 0.95
    by_pair = {(pair.a, pair.b): pair.nll for pair in graded.pairs}
    assert by_pair["Q8_0.gguf", "Q2_K.gguf"].told_apart and by_pair["Q8_0.gguf", "Q2_K.gguf"].mean < 0


def test_controls_clear_them(graded: GradeRecord) -> None:
    assert not is_beyond(graded)
    for row in graded.rows:
        assert row.control is not None and row.control.kl_ratio == pytest.approx(1.0, abs=0.2), row.label


def test_llama_cpp_gives_the_same_perplexity(graded: GradeRecord) -> None:
    for row in graded.rows:
        assert row.engine is not None and row.engine.ppl is not None and row.ppl is not None
        assert row.engine.ppl.value == pytest.approx(row.ppl.value, rel=0.03)


def test_no_type_is_worse_at_later_positions(graded: GradeRecord) -> None:
    assert not [finding for finding in graded.findings if "mean KL" in finding.message]
