"""Real models on 512 tokens of the shipped English text: they agree, to the digits that the design states."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.model import gemma3_270m, smollm2
from diffharness.pipeline import RunRequest, run
from diffharness.records import RunRecord
from diffharness.settings import load_engine, load_tolerances

pytestmark = [pytest.mark.real, pytest.mark.slow]

LOCAL = 1e-8  # every tap, with ggml's conventions where the model has a GELU


def clean_run(model: Path) -> RunRecord:
    record = run(RunRequest(model=model, engine=load_engine("native"), tolerances=load_tolerances(), n_tokens=512))
    assert record.verdict.primary == "agree", record.verdict
    assert not record.legs.graph.unmatched.engine and not record.legs.graph.unmatched.reference
    rows = [row for row in record.legs.graph.taps if row.nmse_local is not None]
    assert len(rows) == len(record.legs.graph.taps) > 300
    assert max(row.nmse_local or 0.0 for row in rows) <= LOCAL
    return record


def same_to_4_digits(record: RunRecord) -> bool:
    return f"{record.scores.reference['artifact'].ppl:.4g}" == f"{record.scores.engine['strict'].ppl:.4g}"


@pytest.fixture(scope="module")
def smollm2_run() -> RunRecord:
    return clean_run(smollm2())


def test_smollm2(smollm2_run: RunRecord) -> None:
    graph = smollm2_run.legs.graph
    assert graph.conventions == [] and graph.as_defined is not None and graph.as_defined.logits is not None
    assert graph.as_defined.logits.nmse <= 1e-9
    assert same_to_4_digits(smollm2_run)


def test_gemma3() -> None:
    record = clean_run(gemma3_270m())
    graph = record.legs.graph
    assert graph.conventions == ["gelu_f16_table"]
    assert graph.as_defined is not None and graph.as_defined.logits is not None
    assert graph.with_conventions is not None and graph.with_conventions.logits is not None
    assert graph.as_defined.logits.nmse <= 1e-5 and graph.with_conventions.logits.nmse <= 1e-6
    assert same_to_4_digits(record)


@pytest.mark.parametrize(
    ("override", "tap", "token"),
    [
        ("llama.rope.freq_base=float:50000", "blk.0.attn_q_rope", 1),
        ("llama.attention.layer_norm_rms_epsilon=float:1e-6", "blk.0.attn_norm", 0),
    ],
)
def test_planted_faults_on_smollm2(override: str, tap: str, token: int) -> None:
    request = RunRequest(
        model=smollm2(),
        engine=load_engine("native"),
        tolerances=load_tolerances(),
        n_tokens=64,
        overrides=(override,),
    )
    first = run(request).first_divergence
    assert first is not None and (first.tap, first.token) == (tap, token)


MODELS = {"smollm2": smollm2, "gemma3": gemma3_270m}


@pytest.mark.parametrize("name", MODELS)
def test_a_short_run_agrees_too(name: str) -> None:
    model = MODELS[name]()
    request = RunRequest(model=model, engine=load_engine("native"), tolerances=load_tolerances(), n_tokens=48)
    assert run(request).verdict.primary == "agree"
