"""Faults of metadata: keys that are lost or say something else, under every architecture's own prefix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from diffharness.damage.draft import Draft, Edit, Fault, Plan, Target
from diffharness.errors import BadInputError, SettingsError

_New = Callable[[Any, float], Any]  # of the value that is there and the strength; None removes the key

_KINDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "int": (int, ("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64")),
    "float": (float, ("FLOAT32", "FLOAT64")),
    "bool": (bool, ("BOOL",)),
    "str": (str, ("STRING",)),
}


def parse_set(text: str, kv_types: Mapping[str, str]) -> tuple[str, Any]:
    """Key and value of `KEY=TYPE:VALUE`, llama.cpp's own syntax; SettingsError where it does not fit the key's type."""
    key, equals, typed = text.partition("=")
    word, colon, value = typed.partition(":")
    if not (key and equals and colon and word in _KINDS):
        raise SettingsError(
            f"--set {text!r} is not KEY=TYPE:VALUE",
            hint="TYPE is int, float, bool (true or false) or str: llama.rope.freq_base=float:10000",
        )
    found = kv_types.get(key)
    if found is not None and found not in _KINDS[word][1]:
        raise SettingsError(f"--set {text!r}: {key} is {found} in the file", hint="give it in the type that it has")
    try:
        if word == "bool":
            return key, {"true": True, "false": False}[value]
        return key, _KINDS[word][0](value)
    except (KeyError, ValueError) as error:
        raise SettingsError(f"--set {text!r}: {value!r} is no {word}") from error


def _plan(key: str, new: _New) -> Plan:
    """The key named, under the architecture's prefix where it begins with a dot; `*` at its end stands for several."""

    def plan(draft: Draft, target: Target) -> Edit:
        wanted = draft.arch + key if key.startswith(".") else key
        known = dict.fromkeys([*draft.metadata, *draft.keys])
        there = {k: value for k in known if _fits(k, wanted) and (value := draft.get(k)) is not None}
        if not there:
            raise BadInputError(f"{target.fault} changes nothing: the file has no key {wanted}")
        keys = {k: _each(new, value, target.strength) for k, value in there.items()}
        same = [k for k, value in there.items() if keys[k] == value]
        if same == list(there):
            hint = "give another --strength"
            raise BadInputError(f"{target.fault} changes nothing: {same[0]} is {there[same[0]]} already", hint=hint)
        return Edit(keys=keys, said={k: said(there[k], keys[k]) for k in there if k not in same})

    return plan


def _fits(key: str, wanted: str) -> bool:
    return key.startswith(wanted[:-1]) if wanted.endswith("*") else key == wanted


def _each(new: _New, value: Any, strength: float) -> Any:
    if isinstance(value, list):
        values = [new(v, strength) for v in value]
        return None if None in values else values
    return new(value, strength)


def said(before: Any, after: Any) -> str:
    """`10000.0 -> removed`."""
    return f"{_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = "removed" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _scaled(value: Any, factor: float) -> Any:
    return max(1, math.floor(value * factor)) if isinstance(value, int) else value * factor


def _removed(value: Any, strength: float) -> Any:
    return None


def _becomes(value: Any, strength: float) -> Any:
    return int(strength) if isinstance(value, int) else strength


_POSITIVE = (1e-30, 1e30)

FAULTS = [
    Fault("rope-base-lost", "the rope base is not in the file; llama.cpp then takes 10000", "metadata",
          _plan(".rope.freq_base", _removed), ""),
    Fault("rope-base-scaled", "another rope base", "metadata",
          _plan(".rope.freq_base", _scaled), "", 2.0, "the factor", _POSITIVE),
    Fault("rope-base-swa", "another rope base of the sliding layers", "metadata",
          _plan(".rope.freq_base_swa", _scaled), "", 2.0, "the factor", _POSITIVE),
    Fault("rope-scaling-lost", "no key of rope scaling is in the file", "metadata",
          _plan(".rope.scaling.*", _removed), ""),
    Fault("rope-half", "fewer dimensions are rotated", "metadata",
          _plan(".rope.dimension_count*", _scaled), "", 0.5, "the factor", _POSITIVE),
    Fault("eps-hard-coded", "another epsilon of the norms", "metadata",
          _plan(".attention.layer_norm_*", _becomes), "", 1e-2, "the value", _POSITIVE),
    Fault("softcap-lost", "the softcap of the logits is not in the file; llama.cpp then takes 30", "metadata",
          _plan(".final_logit_softcapping", _removed), ""),
    Fault("attn-softcap-lost", "that of attention scores is not in the file; llama.cpp then takes 50", "metadata",
          _plan(".attn_logit_softcapping", _removed), ""),
    Fault("window-scaled", "another sliding window", "metadata",
          _plan(".attention.sliding_window", _scaled), "", 0.5, "the factor", _POSITIVE),
    Fault("experts-used", "another number of experts per token", "metadata",
          _plan(".expert_used_count", _becomes), "", 1, "the number", (1.0, 1024.0)),
    Fault("bos-wrong", "another first token", "metadata or tokens",
          _plan("tokenizer.ggml.bos_token_id", _becomes), "", 0, "the id", (0.0, float(1 << 31))),
]  # fmt: skip
