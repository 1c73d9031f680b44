"""What `--override-kv` can and cannot do to this artifact, told before anything runs.

llama.cpp takes an override of a key's own type and leaves any other alone with a line in its log, and
it never overrides an array; a key that it does not read it never looks for. A run under such an override would look
as if the override changed nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from diffharness.engine.known_keys import KnownKeys, known_keys
from diffharness.engine.runner import Engine, EngineCrash, check_overrides
from diffharness.errors import SettingsError
from diffharness.records import Finding
from diffharness.settings import EngineSettings
from diffharness.weights.gguf_file import GgufFile

_WORD = {"FLOAT32": "float", "FLOAT64": "float", "BOOL": "bool", "STRING": "str"}


def check_for(overrides: Sequence[str], artifact: GgufFile, engine: EngineSettings) -> list[Finding]:
    """`check`, and SettingsError for a key that neither the artifact has nor this llama.cpp reads.

    What a llama.cpp reads its library tells; of an engine that does not start, or whose library does not tell, a key
    that the file lacks is only noted.
    """
    notes = check(overrides, artifact.kv_types)
    if notes:
        _refuse_unknown([note.evidence["override"] for note in notes], artifact, _known_keys(engine))
    return notes


def _known_keys(engine: EngineSettings) -> KnownKeys | None:
    try:
        return known_keys(str(Engine(engine).info().get("library")))
    except EngineCrash:  # which the run will tell
        return None


def _refuse_unknown(overrides: Sequence[str], artifact: GgufFile, known: KnownKeys | None) -> None:
    if known is None:
        return
    for override in overrides:
        key, arch = override.partition("=")[0], artifact.arch
        if known.has(key, arch):
            continue
        near = difflib.get_close_matches(key, {*artifact.kv_types, *known.of(arch)}, n=1)
        raise SettingsError(
            f"override {override!r}: expected a key that the artifact has or that llama.cpp reads of {arch} models, "
            f"found {key!r}",
            hint=f"the nearest is {near[0]}" if near else f"a hyperparameter is spelled {arch}.rope.freq_base",
        )


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
            message = (
                f"the override {override} is of a key that the artifact does not have: it changes nothing unless "
                f"llama.cpp reads the key of this architecture"
            )
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
