"""A publisher's gate: limits from a file, readings from what was measured, a row per rule. Pure."""

from diffharness.forensics.gate.judge import conclude, judge
from diffharness.forensics.gate.readings import KINDS, Evidence, Kind, NotRun, Reading
from diffharness.forensics.gate.schema import Gate, Rule, load_gate

__all__ = ["KINDS", "Evidence", "Gate", "Kind", "NotRun", "Reading", "Rule", "conclude", "judge", "load_gate"]
