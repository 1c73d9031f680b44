"""A recipe laid out on a model's tensors: which rule each falls under, and what it then takes.

Rules are for matrices. A vector, a single value or an expert router stays F32, as llama.cpp keeps it, unless a glob
spells its class out: `blk.*.attn_norm.weight` does, `*norm*` does not. A matrix that no glob matches keeps the
checkpoint's own type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from diffharness.errors import SettingsError
from diffharness.forensics.recipes.schema import PLAIN, IntN, Recipe, bits_of, block_of, name_of
from diffharness.taps import split
from diffharness.weights.source import TensorInfo

_ROUTER = "ffn_gate_inp"
_NAMED = 5  # so many tensors are named in a message


@dataclass(frozen=True)
class Planned:
    """One tensor and its scheme. `rule` is the glob that chose it, None where none did."""

    info: TensorInfo
    scheme: str | IntN
    rule: str | None
    fell_back: bool = False  # its rows do not divide into the rule's own blocks

    @property
    def n_bits(self) -> float:
        return self.info.n_elements * bits_of(self.scheme)


@dataclass(frozen=True)
class Plan:
    """Every tensor of a model under one recipe."""

    recipe: Recipe
    tensors: Mapping[str, Planned]

    @property
    def n_bits(self) -> float:
        return sum(tensor.n_bits for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together, those kept as F32 included, scales included, metadata not."""
        return self.n_bits / max(1, sum(tensor.info.n_elements for tensor in self.tensors.values()))

    @property
    def schemes(self) -> dict[str, int]:
        """How many tensors have each scheme, the most frequent first."""
        return dict(Counter(name_of(tensor.scheme) for tensor in self.tensors.values()).most_common())

    @property
    def fell_back(self) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.fell_back]

    @property
    def simulated_only(self) -> list[str]:
        """Tensors in schemes that no GGUF can hold."""
        return [name for name, tensor in self.tensors.items() if isinstance(tensor.scheme, IntN)]


def make_plan(recipe: Recipe, tensors: Mapping[str, TensorInfo]) -> Plan:
    """Lay `recipe` out on `tensors`.

    Raises SettingsError for a glob that matches nothing (or only tensors that have to be spelled out, or only what
    earlier globs took), and for a tensor whose rows are not made of whole blocks where the recipe has no way out.
    """
    planned = {name: _planned(recipe, info) for name, info in tensors.items()}
    used = {tensor.rule for tensor in planned.values()}
    for glob in recipe.tensors:
        if glob not in used:
            raise _useless(recipe, glob, tensors)
    return Plan(recipe, planned)


def _planned(recipe: Recipe, info: TensorInfo) -> Planned:
    glob = next((glob for glob in recipe.tensors if fnmatchcase(info.name, glob) and _meant(glob, info)), None)
    if glob is None:
        kept = info.type if info.type in PLAIN and not _stays_f32(info) else "F32"
        return Planned(info, kept, None)
    scheme = recipe.tensors[glob]
    if info.shape[-1] % block_of(scheme) == 0:
        return Planned(info, scheme, glob)
    for other in recipe.otherwise:
        if info.shape[-1] % block_of(other) == 0:
            return Planned(info, other, glob, fell_back=True)
    others = ", ".join(map(name_of, recipe.otherwise))
    raise SettingsError(
        f"recipe {recipe.name}: expected rows made of whole blocks of {block_of(scheme)} for {name_of(scheme)}, "
        f"found rows of {info.shape[-1]} in {info.name} (under {glob!r})" + (f"; {others} does not fit" * bool(others)),
        hint="say with `otherwise:` how such tensors are stored; F16 always fits",
    )


def _stays_f32(info: TensorInfo) -> bool:
    return sum(size > 1 for size in info.shape) < 2 or _ROUTER in info.name


def _meant(glob: str, info: TensorInfo) -> bool:
    return not _stays_f32(info) or glob.endswith(split(info.name)[1])


def _useless(recipe: Recipe, glob: str, tensors: Mapping[str, TensorInfo]) -> SettingsError:
    matching = [info for name, info in tensors.items() if fnmatchcase(name, glob)]
    if not matching:
        known = sorted({split(name)[1] for name in tensors})
        return SettingsError(
            f"recipe {recipe.name}: expected {glob!r} to match a tensor, none of {len(tensors)} does",
            hint=f"names are GGUF's, such as blk.0.{known[0]}; parts of a name here: {', '.join(known)}",
        )
    names = ", ".join(info.name for info in matching[:_NAMED])
    if not any(_meant(glob, info) for info in matching):
        return SettingsError(
            f"recipe {recipe.name}: {glob!r} matches only tensors that stay F32 unless they are spelled out ({names})",
            hint=f"write {'blk.*.' if matching[0].name.startswith('blk.') else ''}{split(matching[0].name)[1]}",
        )
    return SettingsError(
        f"recipe {recipe.name}: whatever {glob!r} matches ({names}) was taken by globs before it",
        hint="the first glob that matches wins: put the narrow ones first",
    )
