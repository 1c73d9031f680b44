"""Gate files: the shipped one, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffharness.errors import SettingsError
from diffharness.forensics.gate import KINDS, Rule, load_gate


def load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_gate(path)


def test_the_shipped_gate_has_every_rule_and_none_is_optional() -> None:
    gate = load_gate()
    assert set(gate.rules) == set(KINDS)
    assert not any(rule.optional for rule in gate.rules.values())


def test_limits_are_monotonic_in_bits() -> None:
    for name, rule in load_gate().rules.items():
        if rule.by_bits:
            limits = list(rule.limits.values())
            assert limits == sorted(limits, reverse=rule.bound == "at_least"), name


@pytest.mark.parametrize(
    ("bits", "least"), [(32, 8), (8.5, 8), (8, 8), (7.99, 4), (4.5, 4), (3.9, None)]
)  # fmt: skip
def test_the_class_is_the_largest_that_is_not_above(bits: float, least: float | None) -> None:
    assert Rule(at_least={4: 0.99, 8: 0.9999}).class_of(bits) == least


def test_nan_passes_nothing() -> None:
    assert not Rule(at_most=1).passes(float("nan"), 1)
    assert not Rule(at_least=0).passes(float("nan"), 0)
    assert Rule(at_most=1).passes(1, 1) and Rule(at_least=1).passes(1, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules: {}\n", "rules"),
        ("{}\n", "rules"),
        ("rules: {finte: {at_most: 0}}\n", "no rule is called 'finte'"),
        ("rules: {finite: {at_most: 0, at_least: 0}}\n", "one of at_most and at_least"),
        ("rules: {finite: {}}\n", "one of at_most and at_least"),
        ("rules: {finite: {at_least: 0}}\n", "finite needs at_most"),
        ("rules: {cosine: {at_most: 0.9}}\n", "cosine needs at_least"),
        ("rules: {damage: {at_most: {8: 0}}}\n", "has one limit"),
        ("rules: {uniform: {at_most: .nan}}\n", "finite number"),
        ("rules: {uniform: {at_most: yes}}\n", "expected a number"),
        ("rules: {uniform: {at_most: few}}\n", "expected a number"),
        ("rules: {kl: {at_most: {}}}\n", "at_most"),
        ("rules: {kl: {at_most: {many: 1}}}\n", "valid number"),
        ("rules: {kl: {at_most: 1, optinal: true}}\n", "optinal"),
        ("- kl\n", "mapping"),
    ],
)
def test_what_is_no_gate(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=r"mine\.yaml") as caught:
        load(tmp_path, text)
    assert says in str(caught.value)
