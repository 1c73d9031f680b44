"""`apply`: a copy of a GGUF with named, seeded faults, which says in its metadata what was done to it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffharness.damage import faults as table
from diffharness.damage.draft import Bytes, Content, Draft, Fault, Options, Quantize, Target, select
from diffharness.damage.metadata import parse_set, said
from diffharness.errors import BadInputError, CheckpointError, OutputError
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import RawTensor, write_tensors
from diffharness.weights.output import require_replaceable
from diffharness.weights.source import WeightSource

KEY = "diffharness.damage"


@dataclass(frozen=True)
class Change:
    """One tensor or key that was meant to change, and whether its bytes did."""

    name: str
    type: str | None  # of a tensor, as written
    what: str
    changed: bool = True


@dataclass(frozen=True)
class Damage:
    """What was done."""

    out: Path
    faults: list[str]  # with their strengths: `scale:1.1`
    seed: int
    changes: list[Change]
    n_tensors: int  # of the source
    n_bytes: int  # of the copy
    truncated_from: int | None = None  # bytes of the whole copy, where it was cut

    @property
    def tensors(self) -> list[str]:
        """Tensors whose bytes changed."""
        return [change.name for change in self.changes if change.type is not None and change.changed]


def apply(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    how: Sequence[str],
    *,
    seed: int = 0,
    options: Options | None = None,
    quantize: Quantize | None = None,
    checkpoint: WeightSource | None = None,
    set_keys: Sequence[str] = (),
    drop_keys: Sequence[str] = (),
) -> Damage:
    """Write a copy of `source` to `out` with the faults of `how`, in their order.

    `how` holds names of `FAULTS`, with a strength of its own after a colon where wanted (`scale:1.2`).
    Faults on values start from the checkpoint's values, where there is one, else from the artifact's, and
    are stored in the type that the tensor has, by `quantize`; F32, F16 and BF16 need none. `set_keys` are
    `KEY=TYPE:VALUE`. The same arguments give the same bytes. Raises BadInputError for what would change
    nothing, OutputError where the copy cannot be written.
    """
    options = options or Options()
    path = Path(out)
    if not how and not set_keys and not drop_keys:
        raise BadInputError("expected a fault, found none", hint="--how NAME; `diffharness damage --list` has all")
    with open_gguf(Path(source)) as artifact:
        require_replaceable(path)
        _refuse_same(artifact, path)
        if checkpoint is not None and checkpoint.arch != artifact.arch:
            raise CheckpointError(
                f"{checkpoint.label} is a {checkpoint.arch} model, the artifact {artifact.label} says {artifact.arch}",
                hint="give the checkpoint that the artifact was made from",
            )
        draft = Draft(
            contents={name: _stored(artifact, name, checkpoint) for name in artifact.tensors},
            metadata=artifact.metadata,
            keys={},
            seed=seed,
            quantize=quantize,
            type=options.type,
        )
        plan = _Planned(draft)
        chosen = [_chosen(name, options, len(how)) for name in how]
        for fault, strength in chosen:
            plan = plan.with_fault(fault, strength, options)
        plan = plan.with_keys(set_keys, drop_keys, artifact.kv_types)
        names = [f"{fault.name}:{strength:g}" if fault.takes_strength else fault.name for fault, strength in chosen]
        note = _note(names, seed, options, plan, set_keys, drop_keys)
        return _write(artifact, path, plan, names, note)


# -- planning -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Planned:
    """A draft and what was said of each change on the way to it."""

    draft: Draft
    tensors: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    def with_fault(self, fault: Fault, strength: float, options: Options) -> _Planned:
        pattern = options.tensors or fault.tensors
        names = select(self.draft.contents, pattern, options.layers) if fault.tensors else []
        edit = fault.plan(self.draft, Target(fault.name, names, strength))
        contents = {**self.draft.contents, **edit.contents}
        for name in edit.removed:
            del contents[name]
        kept = self.draft.kept if edit.kept is None else edit.kept
        draft = replace(self.draft, contents=contents, keys={**self.draft.keys, **edit.keys}, kept=kept)
        tensors, keys = dict(self.tensors), dict(self.keys)
        for name, text in edit.said.items():
            where = keys if name in edit.keys else tensors
            where[name] = f"{where[name]}, then {text}" if name in where else text
        return _Planned(draft, tensors, keys)

    def with_keys(self, changed: Sequence[str], dropped: Sequence[str], types: Mapping[str, str]) -> _Planned:
        new: dict[str, Any] = dict(parse_set(text, types) for text in changed)
        for key in dropped:
            if self.draft.get(key) is None:
                raise BadInputError(f"--drop {key} changes nothing: the file has no such key")
            new[key] = None
        if "general.architecture" in new:
            raise BadInputError("general.architecture cannot be changed: nothing would read the file as the same model")
        texts = {key: said(_before(self.draft, key), value) for key, value in new.items()}
        return _Planned(replace(self.draft, keys={**self.draft.keys, **new}), self.tensors, {**self.keys, **texts})


def _before(draft: Draft, key: str) -> Any:
    value = draft.get(key)
    return "not there" if value is None else value


def _stored(artifact: GgufFile, name: str, checkpoint: WeightSource | None) -> Content:
    info = artifact.tensors[name]
    theirs = checkpoint.tensors.get(name) if checkpoint is not None else None
    clean = checkpoint if theirs is not None and theirs.shape == info.shape and checkpoint is not None else artifact
    return Content(info, lambda: artifact.raw(name), lambda: clean.read(name))


def _chosen(text: str, options: Options, n_faults: int) -> tuple[Fault, float]:
    """The fault and its strength: its own in `text`, else the option's, else the default."""
    name, colon, given = text.partition(":")
    fault = table.find(name)
    if colon or options.strength is not None:
        if not fault.takes_strength and (colon or n_faults == 1):
            raise BadInputError(f"{name} takes no strength")
        if not colon and n_faults > 1:
            raise BadInputError(
                "--strength with several faults does not say whose it is", hint=f"write --how {name}:{options.strength}"
            )
    strength = _number(name, given) if colon else fault.strength if options.strength is None else options.strength
    low, high = fault.limits
    if fault.takes_strength and not (math.isfinite(strength) and low <= strength <= high):
        wanted = f"from {low:g} to {high:g}" if math.isfinite(low) or math.isfinite(high) else "a finite number"
        raise BadInputError(f"{name}: its strength ({fault.means}) is {wanted}, found {strength:g}")
    return fault, strength


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise BadInputError(f"{name}: expected a number after the colon, found {text!r}") from error


def _refuse_same(artifact: GgufFile, out: Path) -> None:
    if any(out.exists() and out.samefile(path) for path in artifact.paths):
        raise BadInputError(f"{out} is the input itself", hint="give the damaged copy another name")


def _note(
    names: Sequence[str],
    seed: int,
    options: Options,
    plan: _Planned,
    set_keys: Sequence[str],
    drop_keys: Sequence[str],
) -> str:
    """The metadata key's JSON."""
    layers = sorted(options.layers) if options.layers is not None else None
    return json.dumps(
        {
            "how": list(names),
            "seed": seed,
            "tensors_option": options.tensors,
            "layers_option": layers,
            "type": options.type,
            "set": list(set_keys),
            "drop": list(drop_keys),
            "tensors": sorted(plan.tensors),
            "keys": sorted(plan.keys),
        }
    )


# -- writing ------------------------------------------------------------------------------------------


def _write(artifact: GgufFile, out: Path, plan: _Planned, names: list[str], note: str) -> Damage:
    draft, differs = plan.draft, {name: True for name in plan.tensors if name not in plan.draft.contents}

    def data(content: Content) -> Callable[[], Iterable[Bytes]]:
        name = content.info.name

        def pieces() -> Iterable[Bytes]:
            before, new = artifact.raw(name), content.raw()
            if name in plan.tensors:
                differs[name] = new.size != before.size or not np.array_equal(new, before)
            yield new
            artifact.release(name)

        return pieces

    tensors = [RawTensor(c.info.name, c.info.shape, c.info.type, data(c)) for c in draft.contents.values()]
    kvs, changed_keys = _encoded(artifact, draft.keys)
    kvs[KEY] = encode_value(KEY, note)
    part = out.with_name(out.name + ".damaged")
    try:
        write_tensors(part, kvs, tensors, artifact.alignment)
        whole = part.stat().st_size
        kept = min(whole, int(whole * draft.kept))
        if not any(differs.values()) and not changed_keys and kept == whole:
            raise BadInputError(
                f"{', '.join(names) or 'the new values'} changed nothing: what is stored is the same to the bit",
                hint="give a greater strength, or --type F32 where the type rounds the difference away",
            )
        if kept < whole:
            os.truncate(part, kept)
        os.replace(part, out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}", hint="choose another place") from error
    finally:
        part.unlink(missing_ok=True)
    types = {name: artifact.tensors[name].type for name in plan.tensors} | {
        name: content.info.type for name, content in draft.contents.items() if name in plan.tensors
    }
    changes = [Change(name, types[name], text, differs[name]) for name, text in plan.tensors.items()]
    changes += [Change(key, None, text, key in changed_keys) for key, text in plan.keys.items()]
    return Damage(out, names, draft.seed, changes, len(artifact.tensors), kept, whole if kept < whole else None)


def _encoded(artifact: GgufFile, changes: Mapping[str, Any]) -> tuple[dict[str, bytes], set[str]]:
    """Every key's bytes with the changes in place, the keys of splitting left out, and the keys that differ."""
    kvs = {key: raw for key, raw in artifact.kv_raw().items() if not key.startswith("split.")}
    before, types = dict(kvs), artifact.kv_types
    for key, value in changes.items():
        if value is None:
            kvs.pop(key, None)
        else:
            kvs[key] = encode_value(key, value, types.get(key))
    return kvs, {key for key in changes if before.get(key) != kvs.get(key)}
