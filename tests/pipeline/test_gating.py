"""The shipped gate on the embedded model: clean quantizations pass, each kind of damage fails under its own rules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from diffharness import damage
from diffharness.damage import Options
from diffharness.engine.quantizer import Quantizer
from diffharness.engine.runner import Engine
from diffharness.errors import ArtifactFileError, CheckpointError, FixtureError
from diffharness.forensics.gate import Gate, load_gate
from diffharness.layers import parse_layers
from diffharness.pipeline.gating import GateRequest, run_gate
from diffharness.records.gate import GateRecord
from diffharness.settings import data_dir, load_engine, load_tolerances
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import rewrite_gguf

EMBEDDED = data_dir("fixtures") / "tiny-gemma4"
CHECKPOINT, ARTIFACT = EMBEDDED / "checkpoint", EMBEDDED / "tiny-gemma4-Q4_K_M.gguf"
ENGINE = load_engine("native").changed(threads=1)
OF_FORWARDS = {"perplexity", "kl", "kl_control", "engine"}


def gated(model: Path, gate: Gate | None = None, **more: object) -> GateRecord:
    defaults: dict[str, object] = {
        "checkpoint": CHECKPOINT,
        "gate": gate or load_gate(),
        "gate_name": "configs/gate.yaml",
        "engine": ENGINE,
        "tolerances": load_tolerances(),
        "fixture": str(EMBEDDED / "heldout.txt"),
        "n_tokens": 256,
    }
    return run_gate(GateRequest(model=model, **{**defaults, **more}))  # type: ignore[arg-type]


def with_status(record: GateRecord, status: str) -> set[str]:
    return {row.rule for row in record.rules if row.status == status}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("quantized")
    checkpoint_to_gguf(Checkpoint(CHECKPOINT), folder / "plain.gguf")
    return lambda ftype: Engine(ENGINE).quantize(folder / "plain.gguf", folder / f"{ftype}.gguf", ftype)


@pytest.mark.parametrize("ftype", ["Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K"])
def test_clean_quantizations_pass(ftype: str, quantized: Callable[[str], Path]) -> None:
    record = gated(quantized(ftype))
    assert record.outcome == "pass", [row for row in record.rules if row.status != "pass"]
    assert with_status(record, "pass") == set(load_gate().rules)
    assert record.scores.artifact and record.scores.checkpoint and record.scores.engine
    assert record.subject.artifact.sha256 and record.subject.fixture and record.subject.engine
    by_rule = {row.rule: row for row in record.rules}
    assert by_rule["kl_control"].measured == pytest.approx(1, abs=0.05), "clean files are their own control"


@pytest.mark.parametrize(
    ("how", "options", "rules"),
    [
        ("issue-6056", {}, {"damage", "cosine", "uniform", "perplexity", "kl", "kl_control"}),
        ("noise:8", {"layers": "3"}, {"damage", "cosine", "uniform"}),
        ("scale:1.2", {}, {"damage"}),
        ("swapped-gate-up", {}, {"damage", "cosine"}),
        ("nan-block", {}, {"finite", "damage"}),
        ("zero-blocks", {}, {"damage"}),
        ("rope-base-swa:0.01", {}, {"metadata", "perplexity", "kl", "kl_control"}),
    ],
)
def test_damage_fails_under_its_own_rules(how: str, options: dict[str, str], rules: set[str], tmp_path: Path) -> None:
    out = tmp_path / "damaged.gguf"
    chosen = Options(**{k: parse_layers(v) if k == "layers" else v for k, v in options.items()})  # type: ignore[arg-type]
    with Quantizer(ENGINE) as quantizer:
        damage.apply(
            ARTIFACT, out, [how], options=chosen, quantize=quantizer.quantize, checkpoint=Checkpoint(CHECKPOINT)
        )
    record = gated(out)
    assert record.outcome == "fail"
    assert rules <= with_status(record, "fail"), record.summary
    if "metadata" not in rules:
        assert "metadata" in with_status(record, "pass")
    assert {"complete", "tokens"} <= with_status(record, "pass")


def test_another_tokenizer_fails(tmp_path: Path) -> None:
    out = tmp_path / "damaged.gguf"
    with open_gguf(ARTIFACT) as artifact:
        merges = list(artifact.metadata["tokenizer.ggml.merges"])
        rewrite_gguf(artifact, out, kv={"tokenizer.ggml.merges": merges[::-1]})
    record = gated(out, Gate.model_validate({"rules": {"tokens": {"at_most": 0}}}))
    assert record.outcome == "fail" and "the tokenizers disagree at position" in record.rules[0].message
    assert any(finding.kind == "tokens" for finding in record.findings)


def test_a_missing_tensor_fails_though_no_forward_can_run(tmp_path: Path) -> None:
    out = tmp_path / "damaged.gguf"
    damage.apply(ARTIFACT, out, ["missing"], options=Options(tensors="blk.3.attn_k_norm.weight"))
    record = gated(out)
    assert record.outcome == "fail" and "complete" in with_status(record, "fail")
    assert with_status(record, "not_run") == OF_FORWARDS
    row = next(row for row in record.rules if row.rule == "kl")
    assert "blk.3.attn_k_norm.weight" in row.message


def test_only_what_rules_need_is_run() -> None:
    said: list[str] = []
    gate = Gate.model_validate({"rules": {"metadata": {"at_most": 0}, "damage": {"at_most": 0}}})
    record = gated(ARTIFACT, gate, say=said.append)
    assert record.outcome == "pass" and not any("reference" in text or "tokenizers" in text for text in said)
    gate = Gate.model_validate({"rules": {"kl": {"at_most": 0.1}}})
    record = gated(ARTIFACT, gate, say=said.append)
    assert record.outcome == "pass" and record.scores.engine is None
    assert not any("llama.cpp" in text or "quantized like" in text for text in said)


def test_what_cannot_be_run_is_inconclusive(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(CHECKPOINT, bare)
    (bare / "tokenizer.json").unlink()
    gate = Gate.model_validate({"rules": {"tokens": {"at_most": 0}, "finite": {"at_most": 0}}})
    record = gated(ARTIFACT, gate, checkpoint=bare)
    assert record.outcome == "inconclusive" and "tokens was not run" in record.summary
    gate = Gate.model_validate({"rules": {"tokens": {"at_most": 0, "optional": True}, "finite": {"at_most": 0}}})
    assert gated(ARTIFACT, gate, checkpoint=bare).outcome == "pass"


def test_unfit_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FixtureError, match="no fixture 'nowhere'"):
        gated(ARTIFACT, fixture="nowhere")
    with pytest.raises(ArtifactFileError):
        gated(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError):
        gated(ARTIFACT, checkpoint=tmp_path)
    (tmp_path / "cut.gguf").write_bytes(ARTIFACT.read_bytes()[:100_000])
    with pytest.raises(ArtifactFileError):
        gated(tmp_path / "cut.gguf")


def test_too_few_positions_judge_nothing() -> None:
    record = gated(ARTIFACT, n_tokens=3)
    assert record.outcome == "inconclusive" and with_status(record, "fail") == set()
    reasons = {row.message for row in record.rules if row.rule in OF_FORWARDS}
    assert reasons == {"1 scored positions are too few to judge by: give --tokens 40"}


def test_a_checkpoint_with_nan_judges_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    record = gated(ARTIFACT, checkpoint=broken)
    assert record.outcome == "inconclusive" and with_status(record, "fail") == set()
    reasons = " ".join(row.message for row in record.rules)
    assert "holds values that are NaN" in reasons and "its own logits are NaN" in reasons
