"""Readings against limits: a row per rule, and the gate's outcome. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from diffharness.forensics.gate.readings import KINDS, Evidence, Kind, NotRun, Reading
from diffharness.forensics.gate.schema import Gate, Rule
from diffharness.records.gate import Outcome, RuleRow

_OFFENDERS = 20  # that a row lists


def judge(gate: Gate, evidence: Evidence) -> list[RuleRow]:
    """A row per rule, in the file's order; of a rule by bits per weight one for each class that there is."""
    return [row for name, rule in gate.rules.items() for row in _rows(name, rule, KINDS[name], evidence)]


def conclude(rows: Sequence[RuleRow]) -> tuple[Outcome, str]:
    """Fail if any rule fails; pass if every rule that is not optional ran, and at least one did."""
    failing = [row.name for row in rows if row.status == "fail"]
    if failing:
        return "fail", f"{len(failing)} of {len(rows)} rules fail: {', '.join(failing)}"
    wanting = [row for row in rows if row.status == "not_run" and not row.optional]
    if wanting:
        others = f", and {len(wanting) - 1} more" if len(wanting) > 1 else ""
        return "inconclusive", f"no rule fails, but {wanting[0].name} was not run ({wanting[0].message}){others}"
    passing = sum(row.status == "pass" for row in rows)
    if not passing:
        return "inconclusive", "no rule was run"
    left = f"; {len(rows) - passing} optional were not run" if passing < len(rows) else ""
    return "pass", f"{passing} rules pass{left}"


def _rows(name: str, rule: Rule, kind: Kind, evidence: Evidence) -> list[RuleRow]:
    readings = kind.read(evidence)
    if isinstance(readings, NotRun):
        return [_not_run(name, rule, kind, readings.reason)]
    if kind.count:
        return [_counted(name, rule, kind, readings)]
    classes: dict[float | None, list[Reading]] = defaultdict(list)
    for reading in readings:
        classes[rule.class_of(reading.bits)].append(reading)
    rows = [_compared(name, rule, kind, least, classes[least]) for least in rule.limits if least in classes]
    if None in classes:
        fewest = min(rule.limits)
        below = classes[None]
        text = f"no limit for {min(reading.bits for reading in below):.2f} bits per weight ({below[0].what})"
        rows.append(_not_run(name, rule, kind, text, f"below {fewest:g} bits"))
    return rows


def _compared(name: str, rule: Rule, kind: Kind, least: float, readings: Sequence[Reading]) -> RuleRow:
    limit = rule.limits[least]
    ranked = sorted(readings, key=lambda reading: _badness(rule, reading.value), reverse=True)
    beyond = [reading for reading in ranked if not rule.passes(reading.value, limit)]
    worst = ranked[0]
    among = f", the worst of {len(ranked)}" if len(ranked) > 1 else ""
    message = f"{worst.what}{among}" + (f"; {len(beyond)} beyond the limit" if len(beyond) > 1 else "")
    return RuleRow(
        rule=name,
        scope=f"{least:g} bits and up" if rule.by_bits else None,
        status="fail" if beyond else "pass",
        optional=rule.optional,
        measured=worst.value,
        limit=limit,
        bound=rule.bound,
        unit=kind.unit,
        message=message,
        offenders=[_offender(reading) for reading in beyond[:_OFFENDERS]] if len(ranked) > 1 else [],
    )


def _counted(name: str, rule: Rule, kind: Kind, readings: Sequence[Reading]) -> RuleRow:
    (limit,) = rule.limits.values()
    total = sum(reading.value for reading in readings)
    passes = rule.passes(total, limit)
    told = "" if passes or not readings else f": {_offender(readings[0])}"
    rest = f" and {len(readings) - 1} more" if told and len(readings) > 1 else ""
    return RuleRow(
        rule=name,
        status="pass" if passes else "fail",
        optional=rule.optional,
        measured=total,
        limit=limit,
        bound=rule.bound,
        unit=kind.unit,
        message=f"{kind.says}{told}{rest}",
        offenders=[_offender(reading) for reading in readings[:_OFFENDERS]],
    )


def _not_run(name: str, rule: Rule, kind: Kind, reason: str, scope: str | None = None) -> RuleRow:
    return RuleRow(
        rule=name,
        scope=scope,
        status="not_run",
        optional=rule.optional,
        bound=rule.bound,
        unit=kind.unit,
        message=reason,
    )


def _badness(rule: Rule, value: float) -> float:
    if math.isnan(value):
        return math.inf
    return value if rule.bound == "at_most" else -value


def _offender(reading: Reading) -> str:
    return f"{reading.what} ({reading.note})" if reading.note else reading.what
