from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from diffharness import metrics
from diffharness.forensics.drift import Drift, TensorError
from diffharness.forensics.restore import Lineage
from diffharness.legs import artifact
from diffharness.legs.compare import TapComparison
from diffharness.records import MetadataRow

FLOORS = {
    "artifact.kl_factor": 4.0,
    "artifact.kl_floor": 1e-6,
    "artifact.lineage_share": 0.9,
    "artifact.lineage_alike": 0.1,
    "artifact.lineage_vector": 0.01,
    "artifact.lineage_ppl": 2.0,
}
N_LAYER = 12
KINDS = (["sliding"] * 5 + ["global"]) * 2
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((40, 60)).astype(np.float32)
NOISE = RNG.standard_normal((40, 60)).astype(np.float32)
CONTROL = metrics.compare_logits(LOGITS, LOGITS + np.float32(0.02) * NOISE)
NEAR = metrics.compare_logits(LOGITS, LOGITS - np.float32(0.025) * NOISE)
FAR = metrics.compare_logits(LOGITS, LOGITS + NOISE)
PPL = {"artifact": 4.8, "checkpoint": 4.7, "control": 4.8}


def tensor(name: str, matrix: bool = True, far: bool = False, judged: bool = True) -> TensorError:
    control = 5e-3 if matrix else 0.0
    return TensorError(
        name=name,
        type="Q4_K" if matrix else "F32",
        shape=(256, 256) if matrix else (256,),
        error=0.5 if far else control,
        control=control if judged else None,
        cos=0.7 if far else 0.99,
        non_finite=0,
        far_rows=0,
        worst_row=0,
        limit=4 * control + 1e-9 if judged else np.inf,
    )


def drift(far=lambda layer, klass: False, judged: bool = True) -> Drift:
    tensors = [tensor("token_embd.weight", far=far(None, "token_embd"))]
    for il in range(N_LAYER):
        for klass in ("attn_q", "ffn_up", "ffn_down"):
            tensors.append(tensor(f"blk.{il}.{klass}.weight", far=far(il, klass), judged=judged))
        for klass in ("attn_norm", "layer_output_scale"):
            tensors.append(tensor(f"blk.{il}.{klass}.weight", matrix=False, far=far(il, klass)))
    return Drift(tensors, [], [])


CLEAN = artifact.ArtifactInputs(kinds=KINDS, drift=drift(), logits=NEAR, control_logits=CONTROL, perplexity=PPL)


def judge(**changes):
    return artifact.judge(replace(CLEAN, **changes), FLOORS)


def guilty(outcome) -> list[str]:
    return [finding.kind for finding in outcome.findings if finding.kind]


def test_normal_loss_passes_with_its_numbers() -> None:
    outcome = judge()
    assert (outcome.leg.status, outcome.findings, outcome.leg.reason) == ("pass", [], None)
    assert outcome.leg.logits is not None and outcome.leg.logits.kl_mean > 0
    assert outcome.leg.control is not None and len(outcome.leg.tensors) == 1 + 5 * N_LAYER


def test_damage_of_a_period_is_named_with_layers_classes_and_numbers() -> None:
    def far(layer, klass):
        return klass == "layer_output_scale" or (klass in ("attn_q", "ffn_up") and layer % 6 in (2, 3, 4, 5))

    outcome = judge(drift=drift(far), logits=FAR, perplexity=PPL | {"artifact": 364.2})
    assert guilty(outcome) == ["artifact.weights"]
    assert outcome.leg.status == "fail"
    assert outcome.leg.pattern is not None
    assert "attn_q, ffn_up in only layers with number mod 6 in {2, 3, 4, 5} (2-5, 8-11)" in outcome.leg.pattern
    assert "layer_output_scale in every layer" in outcome.leg.pattern
    message = outcome.findings[0].message
    assert "28 of 61" in message and "364.2000 (checkpoint 4.7000)" in message and "mean KL" in message
    assert outcome.findings[0].evidence["classes"] == ["attn_q.weight", "ffn_up.weight", "layer_output_scale.weight"]


def everywhere(layer, klass):
    return klass in ("attn_q", "ffn_up", "ffn_down", "token_embd")


COHERENT = Lineage("coherent", 0.3)


@pytest.mark.parametrize(
    ("ppl", "what"), [(5.9, "a sound model, but not made from"), (364.0, "trained otherwise, not")]
)
def test_another_model_is_lineage(ppl: float, what: str) -> None:
    outcome = judge(drift=drift(everywhere), logits=FAR, perplexity=PPL | {"artifact": ppl}, lineage=COHERENT)
    assert guilty(outcome) == ["artifact.lineage"]
    assert what in outcome.findings[0].message and "0.30" in outcome.findings[0].message


@pytest.mark.parametrize("lineage", [None, Lineage(None, 0.95)])
def test_the_same_without_a_mark_of_lineage_is_damage(lineage: Lineage | None) -> None:
    assert guilty(judge(drift=drift(everywhere), logits=FAR, lineage=lineage)) == ["artifact.weights"]


def test_too_few_positions_leave_it_undecided() -> None:
    assert guilty(judge(drift=drift(everywhere), logits=FAR, too_short=True)) == ["inconclusive"]


def test_only_what_differs_all_over_is_worth_the_forwards_of_lineage() -> None:
    def may_be(far) -> bool:
        return artifact.may_be_other_model(replace(CLEAN, drift=drift(far), logits=FAR), FLOORS)

    assert may_be(everywhere)
    assert not may_be(lambda layer, klass: everywhere(layer, klass) and layer != 7)
    assert not may_be(lambda layer, klass: False)


def row(used: bool, repaired: float | None = None) -> MetadataRow:
    return MetadataRow(key="m.rope.freq_base", artifact=1e4, checkpoint=1e6, used=used, repaired_ppl=repaired)


def test_a_key_that_the_forward_reads_is_named_with_both_values_and_what_repair_does() -> None:
    outcome = judge(metadata=[row(True, 4.8123)], logits=FAR, perplexity=PPL | {"artifact": 93.5})
    assert guilty(outcome) == ["artifact.metadata"]
    message = outcome.findings[0].message
    assert "m.rope.freq_base is 10000.0, by the checkpoint's config 1000000.0" in message
    assert "93.5000 -> 4.8123 repaired" in message


def test_a_key_that_the_forward_does_not_read_is_information() -> None:
    outcome = judge(metadata=[row(False)])
    assert outcome.leg.status == "pass" and guilty(outcome) == []
    assert "without effect" in outcome.findings[0].message


def test_metadata_and_weights_may_both_be_guilty() -> None:
    outcome = judge(metadata=[row(True)], drift=drift(lambda il, k: (il, k) == (3, "attn_q")), logits=FAR)
    assert guilty(outcome) == ["artifact.metadata", "artifact.weights"]
    assert outcome.leg.pattern == "attn_q in only layer 3 (sliding)"


def test_another_model_may_have_wrong_keys_as_well() -> None:
    outcome = judge(metadata=[row(True, 5.2)], drift=drift(everywhere), lineage=COHERENT)
    assert guilty(outcome) == ["artifact.metadata", "artifact.lineage"]


def test_loss_far_above_the_control_without_a_culprit_is_still_damage() -> None:
    outcome = judge(logits=FAR)
    assert guilty(outcome) == ["artifact.weights"]
    assert "no single tensor stands out" in outcome.findings[0].message


def test_one_position_alone_never_convicts() -> None:
    """A token that a mixture of experts routed otherwise makes the mean, and says nothing of the file."""
    one = LOGITS + np.float32(0.02) * NOISE
    one[3] = LOGITS[3] + 5 * NOISE[3]
    logits = metrics.compare_logits(LOGITS, one)
    assert logits.kl_mean > 10 * CONTROL.kl_mean
    assert guilty(judge(logits=logits)) == []


def test_kl_alone_never_convicts_without_a_control() -> None:
    assert guilty(judge(logits=FAR, control_logits=None)) == []


def test_nan_is_a_matter_of_the_file() -> None:
    tensors = drift().tensors
    tensors[3] = replace(tensors[3], non_finite=32, error=np.inf)
    outcome = judge(drift=Drift(tensors, [], []))
    assert guilty(outcome) == ["artifact.file"]
    assert "32 values in blk.0.ffn_down.weight" in outcome.findings[0].message


def test_a_missing_tensor_is_damage_and_an_extra_one_is_not() -> None:
    outcome = judge(drift=replace(drift(), missing=["rope_freqs.weight"]))
    assert guilty(outcome) == ["artifact.weights"] and "rope_freqs.weight" in outcome.findings[0].message
    outcome = judge(drift=replace(drift(), extra=["x.weight"]))
    assert guilty(outcome) == [] and "x.weight" in outcome.findings[0].message


def test_nothing_judged_is_not_a_pass() -> None:
    unjudged = Drift([tensor("blk.0.attn_q.weight", judged=False)], [], [])
    outcome = judge(drift=unjudged, control_logits=None)
    assert outcome.leg.status == "not_run" and "no control" in (outcome.leg.reason or "")
    assert artifact.not_run("no checkpoint was given").leg.reason == "no checkpoint was given"


def taps(factors: Sequence[float]) -> TapComparison:
    comparison = TapComparison(40)
    for il, factor in enumerate(factors):
        x = LOGITS + il
        comparison.feed(f"blk.{il}.layer_out", 0, x + np.float32(factor) * NOISE, x)
    return comparison


def test_the_first_tap_beyond_the_control_is_the_first_divergence() -> None:
    inputs = {"taps": taps([0.01, 0.01, 0.5, 0.6]), "control_taps": taps([0.01, 0.01, 0.01, 0.01])}
    outcome = judge(drift=drift(lambda il, k: il == 2), **inputs)
    assert outcome.first_divergence is not None and outcome.first_divergence.tap == "blk.2.layer_out"
    assert [r.ok for r in outcome.leg.taps] == [True, True, False, False]
    assert judge(**inputs | {"taps": taps([0.01] * 4)}).first_divergence is None
