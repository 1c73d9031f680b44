"""The table of faults, by name."""

from __future__ import annotations

from collections.abc import Mapping

from diffharness.damage import exchange, metadata, raw, values
from diffharness.damage.draft import Draft, Edit, Fault, Target
from diffharness.damage.presets import presets
from diffharness.errors import BadInputError


def _truncated(draft: Draft, target: Target) -> Edit:
    return Edit(kept=target.strength)


def _rope_freqs_missing(draft: Draft, target: Target) -> Edit:
    names = [name for name in draft.contents if name.startswith("rope_freqs")]
    if not names:
        raise BadInputError("rope-freqs-missing changes nothing: the file has no tensor rope_freqs.weight")
    return Edit(removed=names, said=dict.fromkeys(names, "left out"))


_OF_FILES = [
    Fault("rope-freqs-missing", "the tensor of rotary frequencies is left out", "missing tensors",
          _rope_freqs_missing, ""),
    Fault("truncated", "the file ends early: what is written is no whole GGUF", "file",
          _truncated, "", 0.5, "share that is kept", (0.0, 1.0)),
]  # fmt: skip


def _table() -> Mapping[str, Fault]:
    simple = [*values.FAULTS, *raw.FAULTS, *exchange.FAULTS, *metadata.FAULTS, *_OF_FILES]
    by_name = {fault.name: fault for fault in simple}
    return by_name | {fault.name: fault for fault in presets(by_name)}


FAULTS: Mapping[str, Fault] = _table()


def find(name: str) -> Fault:
    """The fault of that name; BadInputError names those that are near."""
    if name in FAULTS:
        return FAULTS[name]
    import difflib

    near = difflib.get_close_matches(name, FAULTS, n=3, cutoff=0.4)
    raise BadInputError(
        f"there is no fault {name!r}",
        hint=(f"did you mean {', '.join(near)}? " if near else "") + "`diffharness damage --list` has all",
    )
