"""What an explanation prints, as text and as Markdown."""

from __future__ import annotations

from diffharness.records import ArtifactSubject, Divergence, Finding, GraphLeg, Subject, Verdict
from diffharness.records.base import parse
from diffharness.records.explain import ExplainRecord, Explanation, Facts, HypothesisRow
from diffharness.report.document import to_markdown, to_text
from diffharness.report.explain import document

ROW = HypothesisRow(
    names=["scaling.softcap-absent"],
    says="final_logit_softcapping were absent",
    fits="yes",
    tap="logits",
    local_before=0.31,
    local_after=4e-13,
    logits_before=0.33,
    logits_after=5e-12,
)
FACTS = Facts(
    tap="blk.3.attn_q_rope",
    ratios={"attn_q_rope": 0.5},
    rotation={"attn_q": [1.0, 0.97]},
    rank=3,
    rank_of=80,
    tokens=79,
    tokens_of=80,
    words=["blk.3.attn_q_rope is 0.5 times the reference's by least squares"],
)


def record(explanation: Explanation | None) -> ExplainRecord:
    guilty = explanation is not None
    return ExplainRecord(
        verdict=Verdict(primary="engine.graph" if guilty else "agree", all=[], summary="Everything agrees."),
        first_divergence=Divergence(leg="graph", tap="logits", token=2, nmse_local=0.31) if guilty else None,
        explanation=explanation,
        graph=GraphLeg(status="fail" if guilty else "pass", affected="all layers" if guilty else None),
        findings=[Finding(kind=None, leg="graph", message="2 taps only the engine exposes")],
        subject=Subject(artifact=ArtifactSubject(path="m.gguf")),
        repro="diffharness explain m.gguf",
    )


def test_a_hypothesis_that_fits() -> None:
    answer = "the engine behaves as if final_logit_softcapping were absent: NMSE 3.1e-01 -> 4.0e-13 at logits"
    other = ROW.model_copy(update={"says": "the cap were 4000", "equal": True, "fitted": True, "places": "head"})
    made = record(Explanation(answer=answer, found=True, hypotheses=[ROW, other], tried=11, evaluations=26, budget=600))
    text = to_text(document(made))
    assert "verdict: engine.graph" in text and "The engine behaves as if final_logit_softcapping" in text
    assert "yes, as well" in text and "4.0e-13" in text and "11 hypotheses, 26 of at most 600" in text
    assert "the cap were 4000 (head)" in to_markdown(document(made))
    assert parse(ExplainRecord, made.to_json(), "here") == made


def test_facts_where_nothing_fits() -> None:
    made = record(
        Explanation(answer="none of the 5 hypotheses that were tried fits.", found=False, facts=FACTS, exhausted=True)
    )
    text = to_text(document(made))
    assert "What is known" in text and "0.5 times" in text and "0.97" in text and "where the search ended" in text


def test_nothing_to_explain() -> None:
    text = to_text(document(record(None)))
    assert "There is nothing to explain: Everything agrees." in text and "2 taps only the engine exposes" in text
