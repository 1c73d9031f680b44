"""Each rule of the shipped gate: passes on sound evidence, fails on its own fault, and says so where it was not run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diffharness.forensics.gate import Evidence, Gate, NotRun, conclude, judge, load_gate
from diffharness.records.gate import RuleRow
from diffharness.records.grade import EngineGrade
from diffharness.records.inspect import InspectRecord
from diffharness.records.legs import MetadataRow, TokensLeg
from tests.forensics.gate.evidence import evidence, graded, measures

SHIPPED = load_gate()


def failing(found: Evidence, gate: Gate = SHIPPED) -> dict[str, RuleRow]:
    return {row.rule: row for row in judge(gate, found) if row.status == "fail"}


def test_sound_evidence_passes_every_rule() -> None:
    rows = judge(SHIPPED, evidence())
    assert {row.status for row in rows} == {"pass"} and {row.rule for row in rows} == set(SHIPPED.rules)
    assert [row.scope for row in rows if row.rule == "cosine"] == ["16 bits and up", "6.5 bits and up", "4 bits and up"]
    assert conclude(rows)[0] == "pass"


def in_tensor(index: int, **values: object) -> Callable[[InspectRecord], object]:
    def change(found: InspectRecord) -> None:
        found.tensors[index] = found.tensors[index].model_copy(update=values)

    return change


@pytest.mark.parametrize(
    ("rules", "change", "says"),
    [
        ({"finite"}, in_tensor(2, nan=3, inf=1), "blk.0.attn_q.weight (3 NaN, 1 infinite)"),
        ({"complete"}, lambda found: found.missing.append("blk.0.layer_output_scale.weight"), "layer_output_scale"),
        ({"metadata"}, lambda found: found.metadata.append(
            MetadataRow(key="m.rope.freq_base", artifact=1e4, checkpoint=1e6, used=True)), "freq_base"),
        ({"damage"}, in_tensor(3, drifted=True, why="2 of 8 rows"), "blk.0.ffn_down.weight (2 of 8 rows)"),
        ({"cosine", "uniform"}, in_tensor(5, artifact=measures(0.3)), "blk.1.attn_q.weight"),
        ({"uniform"}, in_tensor(5, artifact=measures(0.155)), "blk.1.attn_q.weight (error 0.15, median 0.074)"),
        ({"uniform"}, in_tensor(4, artifact=measures(3e-3)), "blk.1.attn_norm.weight (error 0.003, median 0.001)"),
        ({"cosine", "uniform"}, in_tensor(5, artifact=measures(float("nan"))), "blk.1.attn_q.weight"),
        ({"cosine"}, in_tensor(5, artifact=None), "blk.1.attn_q.weight"),
    ],
)  # fmt: skip
def test_each_rule_on_tensors_fails_on_its_own_fault(
    rules: set[str], change: Callable[[InspectRecord], object], says: str
) -> None:
    found = failing(evidence(change))
    assert found.keys() == rules
    row = next(iter(found.values()))
    assert says in f"{row.message} {row.offenders}"


@pytest.mark.parametrize(
    ("rules", "others", "says"),
    [
        ({"perplexity"}, {"grade": graded(ratio=1.3)}, "perplexity 2.6000, the checkpoint's 2.0000 (+30.00 ± 0.01 %)"),
        ({"perplexity", "engine"}, {"grade": graded(ratio=float("inf"))}, "inf"),
        ({"kl", "kl_control"}, {"grade": graded(kl=2.0)}, "mean KL 2.0e+00, the control's 1.0e-03"),
        ({"kl_control"}, {"grade": graded(kl=4.1e-3)}, "mean KL 4.1e-03, the control's 1.0e-03"),
        ({"kl", "kl_control"}, {"grade": graded(kl=float("nan"))}, "mean KL nan"),
        ({"engine"}, {"grade": graded(engine=2.5)}, "perplexity 2.5000 by llama.cpp, 2.0020 by the reference"),
        ({"engine"}, {"grade": graded().model_copy(update={"engine": EngineGrade(error="it aborted")})}, "it aborted"),
        ({"tokens"}, {"tokens": TokensLeg(status="fail", reason="they part at 3")}, "they part at 3"),
    ],
)
def test_each_other_rule_fails_on_its_own_fault(rules: set[str], others: dict[str, object], says: str) -> None:
    found = failing(evidence(**others))
    assert found.keys() == rules
    assert says in found[sorted(rules)[-1]].message


def test_a_file_of_fewer_bits_may_lose_more() -> None:
    assert failing(evidence(grade=graded(ratio=1.1), bits=8.5)).keys() == {"perplexity"}
    assert not failing(evidence(grade=graded(ratio=1.1), bits=3.1))


def test_keys_that_nothing_reads_are_no_fault() -> None:
    row = MetadataRow(key="m.unused", artifact=1, checkpoint=2, used=False)
    assert not failing(evidence(lambda found: found.metadata.append(row)))


@pytest.mark.parametrize(
    ("others", "rules"),
    [
        ({"inspection": NotRun("no control")}, {"finite", "complete", "metadata", "damage", "cosine", "uniform"}),
        ({"grade": NotRun("no logits")}, {"perplexity", "kl", "kl_control", "engine"}),
        ({"tokens": NotRun("no text")}, {"tokens"}),
        ({"tokens": TokensLeg(reason="no text")}, {"tokens"}),
        (
            {"grade": graded().model_copy(update={"statistics": None, "engine": None})},
            {"perplexity", "kl", "kl_control", "engine"},
        ),
        ({"grade": graded().model_copy(update={"control": None})}, {"kl_control"}),
        ({"bits": 1.1}, {"perplexity", "kl"}),
    ],
)
def test_what_was_not_run_is_no_pass(others: dict[str, object], rules: set[str]) -> None:
    rows = judge(SHIPPED, evidence(**others))
    assert {row.rule for row in rows if row.status == "not_run"} == rules
    outcome, summary = conclude(rows)
    assert outcome == "inconclusive" and "was not run" in summary


def test_tensors_without_a_control_are_not_judged_but_damage_is_told() -> None:
    gate = Gate.model_validate({"rules": {"damage": {"at_most": 0}}})
    (row,) = judge(gate, evidence(in_tensor(5, limit=None)))
    assert row.status == "not_run" and "1 of 19 tensors have no control: blk.1.attn_q.weight" in row.message

    def both(found: InspectRecord) -> None:
        in_tensor(5, limit=None)(found)
        in_tensor(6, drifted=True)(found)

    (row,) = judge(gate, evidence(both))
    assert row.status == "fail" and row.measured == 1


def test_nothing_at_all_is_no_pass() -> None:
    def empty(found: InspectRecord) -> None:
        found.tensors.clear()

    rows = judge(SHIPPED, evidence(empty))
    assert {row.rule for row in rows if row.status == "not_run"} >= {"finite", "damage", "cosine", "uniform"}
    assert conclude([])[0] == "inconclusive"


def test_optional_rules_may_be_left_out_but_not_all_of_them() -> None:
    rules = {"tokens": {"at_most": 0, "optional": True}, "kl": {"at_most": 1}}
    rows = judge(Gate.model_validate({"rules": rules}), evidence(tokens=NotRun("no text")))
    assert conclude(rows) == ("pass", "1 rules pass; 1 optional were not run")
    assert conclude(rows[:1])[0] == "inconclusive"
    rows = judge(Gate.model_validate({"rules": rules}), evidence(tokens=TokensLeg(status="fail", reason="they part")))
    assert conclude(rows)[0] == "fail", "optional is for what could not be run"


def test_too_few_layers_for_a_median_are_not_judged() -> None:
    def shorten(found: InspectRecord) -> None:
        found.tensors = [t for t in found.tensors if t.layer is None or t.layer < 2]

    gate = Gate.model_validate({"rules": {"uniform": {"at_most": 1.5}}})
    (row,) = judge(gate, evidence(shorten))
    assert row.status == "not_run" and "3 layers" in row.message


def test_where_most_layers_are_damaged_the_sound_ones_stand_out() -> None:
    def damage(found: InspectRecord) -> None:
        for i, t in enumerate(found.tensors):
            if t.type == "Q4_K" and t.layer != 0:
                found.tensors[i] = t.model_copy(update={"artifact": measures(0.9)})

    assert failing(evidence(damage))["uniform"].message == "blk.0.attn_q.weight, the worst of 18"


def test_a_layer_that_is_harder_to_quantize_is_no_fault() -> None:
    assert not failing(evidence(in_tensor(5, artifact=measures(0.001), control=measures(0.001))))
    hard = {"artifact": measures(0.15), "control": measures(0.15)}
    assert not failing(evidence(in_tensor(5, **hard)))


def test_the_worst_is_told_first_and_lists_are_short() -> None:
    def worsen(found: InspectRecord) -> None:
        for i, t in enumerate(found.tensors):
            if t.type == "Q4_K":
                found.tensors[i] = t.model_copy(update={"artifact": measures(0.3 + 0.01 * i)})

    rows = failing(evidence(worsen))
    assert rows["cosine"].message == "blk.5.attn_q.weight, the worst of 6; 6 beyond the limit"
    assert rows["cosine"].offenders[0].startswith("blk.5") and len(rows["cosine"].offenders) == 6
    many = evidence(lambda found: found.missing.extend(f"t{i}" for i in range(100)))
    row = failing(many)["complete"]
    assert row.measured == 100 and len(row.offenders) == 20 and "t0 and 99 more" in row.message
