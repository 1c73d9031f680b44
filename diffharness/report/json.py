"""The record itself, as JSON."""

from __future__ import annotations

from diffharness.records import RunRecord


def to_json(record: RunRecord) -> str:
    """Schema `diffharness.run/1`, strictly within JSON's standard, with a newline at the end."""
    return record.to_json() + "\n"
