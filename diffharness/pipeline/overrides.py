"""What `--override-kv` can and cannot do to this artifact, told before anything runs.

llama.cpp takes an override of a key's own type and leaves any other alone with a line in its log, and
it never overrides an array. A run under such an override would look as if the override changed nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffharness.engine.runner import check_overrides
from diffharness.errors import SettingsError
from diffharness.records import Finding

_WORD = {"FLOAT32": "float", "FLOAT64": "float", "BOOL": "bool", "STRING": "str"}


def check(overrides: Sequence[str], kv_types: Mapping[str, str]) -> list[Finding]:
    """SettingsError for an override that llama.cpp would leave alone; a note for each key that the file lacks.

    `kv_types` are the artifact's keys with their GGUF types. A key that the file lacks may still be one
    that llama.cpp reads, so that it is no error.
    """
    check_overrides(overrides)
    notes = []
    for override in overrides:
        key, _, typed = override.partition("=")
        word = typed.partition(":")[0]
        found = kv_types.get(key)
        if found is None:
            message = f"the override {override} is of a key that the artifact does not have: check how it is spelled"
            notes.append(Finding(kind=None, leg=None, message=message, evidence={"override": override}))
        elif found.startswith("ARRAY"):
            raise SettingsError(
                f"override {override!r}: {key} is an array in the artifact, and llama.cpp overrides single values only",
                hint="override another key, or change the file",
            )
        elif word != (expected := _WORD.get(found, "int")):
            raise SettingsError(
                f"override {override!r}: {key} is {found} in the artifact, and llama.cpp ignores type {word} for it",
                hint=f"write {key}={expected}:VALUE",
            )
    return notes
