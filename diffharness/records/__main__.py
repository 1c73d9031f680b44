"""`python -m diffharness.records [NAME]`: the JSON schema of a record, by default the run record's."""

from __future__ import annotations

import importlib
import json
import sys

from diffharness.records.base import Record


def record_of(name: str) -> type[Record]:
    """The record that the module `diffharness.records.<name>` defines."""
    module = importlib.import_module(f"diffharness.records.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Record) and value.__module__ == module.__name__
    ]
    (record,) = found
    return record


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "run"
    print(json.dumps(record_of(name).model_json_schema(mode="serialization"), indent=2, ensure_ascii=False))
