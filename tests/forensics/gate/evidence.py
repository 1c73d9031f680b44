"""Evidence for rules, made by hand: a sound file of two classes in six layers, to be changed at one place."""

from __future__ import annotations

from collections.abc import Callable

from diffharness.forensics.gate import Evidence
from diffharness.records.grade import ControlRow, EngineGrade, Estimate, GradeRow, KlStatistics
from diffharness.records.inspect import InspectRecord, Measures, TensorMeasures
from diffharness.records.legs import TokensLeg
from diffharness.records.run import Verdict
from diffharness.records.subject import ArtifactSubject, Subject


def measures(error: float) -> Measures:
    return Measures(
        cos=1 - error**2 / 2, cos_row_min=0.9, cos_row_p1=0.9, cos_row_p50=0.9, error=error, sqnr=20, scale=1,
        max_abs=0.1, kl_drift=0.0, outlier_kept=1, channel_kept=1,
    )  # fmt: skip


def tensor(name: str, type_name: str = "Q4_K", bpw: float = 4.5, error: float = 0.07) -> TensorMeasures:
    layer = int(name.split(".")[1]) if name.startswith("blk.") else None
    return TensorMeasures(
        name=name, type=type_name, shape=[8, 256], layer=layer, klass="any", bpw=bpw, artifact=measures(error),
        control=measures(error), limit=2 * error + 1e-6, ratio=1.0,
    )  # fmt: skip


def inspection(change: Callable[[InspectRecord], object] = lambda found: None) -> InspectRecord:
    """`change` works on a record of sound tensors."""
    tensors = [tensor("token_embd.weight", "Q6_K", 6.5625, 0.016)]
    for il in range(6):
        tensors += [
            tensor(f"blk.{il}.attn_norm.weight", "F32", 32, 0.0),
            tensor(f"blk.{il}.attn_q.weight", error=0.07 + 0.001 * il),
            tensor(f"blk.{il}.ffn_down.weight", "Q6_K", 6.5625, 0.016),
        ]
    found = InspectRecord(
        verdict=Verdict(primary="agree", all=["agree"], summary="all is well"),
        subject=Subject(artifact=ArtifactSubject(path="m.gguf")),
        tensors=tensors,
    )
    change(found)
    return found


def statistics(ratio: float = 1.001, kl: float = 1e-3) -> KlStatistics:
    def estimate(value: float) -> Estimate:
        return Estimate(value=value, error=1e-4)

    return KlStatistics(
        n=100,
        ppl=estimate(2 * ratio),
        ppl_base=estimate(2.0),
        ln_ratio=estimate(0.0),
        ratio=estimate(ratio),
        difference=estimate(0.0),
        kl=estimate(kl),
        kl_quantiles={"50%": kl / 2},
        p_diff=estimate(0.0),
        p_diff_quantiles={},
        p_diff_rms=estimate(0.0),
        top1=estimate(0.99),
    )


def graded(ratio: float = 1.001, kl: float = 1e-3, engine: float | None = None) -> GradeRow:
    """`engine` is llama.cpp's perplexity, by default the reference's. The control has a KL of 1e-3."""
    by_engine = Estimate(value=2 * ratio if engine is None else engine)
    return GradeRow(
        label="m.gguf",
        artifact=ArtifactSubject(path="m.gguf"),
        ppl=Estimate(value=2 * ratio),
        engine=EngineGrade(ppl=by_engine),
        statistics=statistics(ratio, kl),
        control=ControlRow(statistics=statistics(), kl_limit=4e-3, median_limit=2e-3, beyond=False),
    )


def evidence(change: Callable[[InspectRecord], object] = lambda found: None, **others: object) -> Evidence:
    """Sound evidence, with the inspection changed and other parts replaced."""
    parts = {
        "inspection": inspection(change),
        "grade": graded(),
        "tokens": TokensLeg(status="pass"),
        "bits": 4.8,
        **others,
    }
    return Evidence(**parts)  # type: ignore[arg-type]
