"""The table of cases is what it claims to be, and what counts as a mistake is one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from bench.confusion.cases import CASES, EMBEDDED, Base, Case
from bench.confusion.judging import Judged, Said, faults_of
from bench.confusion.matrix import report, table
from diffharness.damage import FAULTS
from diffharness.damage.faults import find
from diffharness.weights.dequant import BLOCKS

BAND = 2.0
AGREE, WEIGHTS = (
    Said(("agree",)),
    Said(("artifact.weights",), frozenset({"a", "b"}), frozenset({"scale"}), {"a": 9.0, "b": 3.0}),
)
CLEAN = Case(Base(EMBEDDED, "Q8_0"), "clean")
DAMAGED = Case(Base(EMBEDDED, "Q8_0"), "weights", ("scale:2",), patterns=frozenset({"scale"}))
LINEAGE = Case(Base("tiny-gemma4-tuned-6", "Q8_0"), "lineage")


def test_enough_of_everything() -> None:
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)
    assert len({case.base.model for case in CASES}) >= 3
    assert {case.truth for case in CASES} == {"clean", "weights", "metadata", "file", "lineage"}
    clean = [case.base for case in CASES if case.truth == "clean"]
    assert {"none", "chi-square", "log-normal"} == {base.weighting for base in clean}
    assert {base.kind for base in clean} >= set("Q8_0 Q6_K Q5_K Q4_K Q3_K Q2_K Q4_0 Q4_1 Q5_0 Q5_1 IQ4_XS".split())
    assert all(base.kind.startswith("mixture-") or base.kind in BLOCKS for base in clean)


def test_every_fault_is_tried() -> None:
    used = {how.partition(":")[0] for case in CASES for how in case.how}
    assert all(find(name) for name in used)
    # Grouped-query attention has no K of Q's shape, and no tiny model a bias or norm that is not in the table.
    assert set(FAULTS) - used == {"swapped-q-k", "bos-wrong"}


def test_quick_cases_are_few_and_of_each_kind() -> None:
    quick = Counter(case.truth for case in CASES if case.quick)
    assert 12 <= sum(quick.values()) <= 24 and set(quick) >= {"clean", "weights", "metadata", "file"}


def judged(case: Case, inspect: Said, run: Said | None = None, ppl: float | None = None) -> Judged:
    return Judged(case, frozenset({"a", "b"}) if case.truth == "weights" else frozenset(), inspect, run, ppl)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (judged(CLEAN, AGREE, AGREE), []),
        (judged(CLEAN, WEIGHTS, AGREE), ["inspect calls a clean file artifact.weights"]),
        (judged(CLEAN, AGREE, Said(("artifact.lineage",))), ["run calls a clean file artifact.lineage"]),
        (judged(CLEAN, Said(("inconclusive",))), ["inspect calls a clean file inconclusive"]),
        (judged(DAMAGED, WEIGHTS, replace(WEIGHTS, patterns=frozenset())), []),
        (judged(DAMAGED, replace(WEIGHTS, patterns=frozenset({"noise"}))), ["inspect names noise, not scale"]),
        (
            judged(DAMAGED, replace(WEIGHTS, tensors=frozenset({"a", "b", "c"}))),
            ["inspect accuses 1 untouched tensors: c"],
        ),
        (
            judged(DAMAGED, replace(WEIGHTS, tensors=frozenset({"a"}))),
            ["inspect leaves out 1 of 2 tensors beyond the band: b"],
        ),
        (judged(DAMAGED, replace(WEIGHTS, tensors=frozenset({"a"}), ratios={"a": 9.0, "b": 1.5})), []),
        (judged(DAMAGED, WEIGHTS, AGREE), ["run says agree, not artifact.weights"]),
        (judged(DAMAGED, replace(AGREE, ratios={"a": 2.1})), ["inspect says agree, not artifact.weights"]),
        (judged(DAMAGED, replace(AGREE, ratios={"a": 1.1}), ppl=1.02), ["inspect says agree, not artifact.weights"]),
        (judged(LINEAGE, Said(("inconclusive",)), Said(("artifact.lineage",))), []),
        (judged(LINEAGE, WEIGHTS, Said(("artifact.lineage",))), ["inspect says artifact.weights"]),
        (judged(LINEAGE, AGREE, AGREE), ["run says agree, not artifact.lineage"]),
    ],
)
def test_what_is_a_mistake(item: Judged, expected: list[str]) -> None:
    assert faults_of(item, BAND) == (expected, None)


def test_below_the_band_is_told_and_no_mistake() -> None:
    faults, excused = faults_of(judged(DAMAGED, replace(AGREE, ratios={"a": 1.1}), ppl=1.004), BAND)
    assert not faults and excused == "error 1.10 times the control's, perplexity +0.40%"
    faults, excused = faults_of(judged(DAMAGED, replace(AGREE, ratios={"a": 1.1}), AGREE), BAND)
    assert not faults and excused is not None and "random weights" in excused


def test_report() -> None:
    items = [
        judged(CLEAN, AGREE, AGREE),
        replace(judged(DAMAGED, AGREE, AGREE), excused="perplexity +0.1%"),
        replace(judged(DAMAGED, AGREE, WEIGHTS), faults=("inspect says agree",)),
    ]
    rows = table(items, "inspect").splitlines()
    assert rows[0].split() == ["inspect", "agree"] and rows[1].split() == ["clean", "1"]
    assert table(items, "run").splitlines()[2].split() == ["weights", "1", "1"]
    text = report(items)
    assert "named by nobody: 1" in text and "wrong: 1" in text and "3 cases, 1 architectures (gemma4)" in text
