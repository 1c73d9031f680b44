"""Does a source hold the tensors that its architecture has, and only finite numbers?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffharness.errors import ArtifactFileError, UnsupportedError
from diffharness.weights import names
from diffharness.weights.checkpoint import MALFORMED
from diffharness.weights.dequant import BLOCKS, SCALES
from diffharness.weights.gguf_file import GgufFile
from diffharness.weights.gguf_write import chunks_of_rows
from diffharness.weights.names._map import TensorRule
from diffharness.weights.source import TensorInfo, WeightSource
from diffharness.words import are, counted, listed

MATRIX_SCALES = ("scale", "input_scale")  # beside any matrix of a file: a factor on its products, and on its inputs
_NAMED = 5  # so many tensors are named in a message


def check_against(source: WeightSource, rules: Sequence[TensorRule]) -> list[str]:
    """Hold the tensors of `source` against those that its metadata calls for; returns the extra ones.

    Raises ArtifactFileError that names what is missing or has another shape, with both shapes. Where
    something is missing while something unknown is there, it may be stored in a form that this tool
    does not know (fused projections): that is an UnsupportedError.
    """
    tensors = source.tensors
    known = {rule.name for rule in rules}
    known |= {name.removesuffix("weight") + scale for name in known for scale in MATRIX_SCALES}
    extra = [name for name in tensors if name not in known]
    missing = [rule.name for rule in rules if rule.required and rule.name not in tensors]
    lacks = f"{counted(len(missing), 'tensor')} of a {source.arch} model {are(len(missing))} missing"
    if missing and extra:
        raise UnsupportedError(
            f"{source.label}: {lacks} ({_some(missing)}), and "
            f"{len(extra)} {are(len(extra))} there that it does not have ({_some(extra)})",
            hint="either the file is of another layout than this tool knows, or it is damaged",
            tensor=missing[0],
        )
    if missing:
        raise ArtifactFileError(
            f"{source.label}: {lacks}: {_some(missing)}",
            hint="the file was not finished, or its metadata is of another model",
            tensor=missing[0],
        )
    misshapen = [
        f"{rule.name}: expected {rule.shape}, found {tensors[rule.name].shape}"
        for rule in rules
        if rule.name in tensors and _significant(tensors[rule.name].shape) != _significant(rule.shape)
    ]
    if misshapen:
        raise ArtifactFileError(
            f"{source.label}: {counted(len(misshapen), 'tensor has', 'tensors have')} a shape that the metadata does "
            f"not call for (outermost axis first): {_some(misshapen)}",
            hint="a hyperparameter or the tensor is wrong: compare the metadata with the checkpoint's config.json",
            tensor=misshapen[0].split(":")[0],
        )
    return extra


def _significant(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without leading axes of length one, which a file may or may not state."""
    first = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return tuple(shape[first:])


def check_model(source: WeightSource) -> list[str]:
    """`check_against` the rules of the source's own architecture and metadata, which may be hostile."""
    arch_map = names.for_arch(source.arch)
    try:
        rules = arch_map.rules(source.metadata)
    except MALFORMED as error:
        raise ArtifactFileError(
            f"{source.label}: a metadata value is not what a {source.arch} model has: {type(error).__name__}: {error}",
            hint="compare the metadata with the checkpoint's config.json",
        ) from error
    return check_against(source, rules)


@dataclass(frozen=True)
class NonFinite:
    """NaN or infinite values of one tensor: how many, and the first by flat index."""

    tensor: str
    count: int
    first: int


def non_finite(source: WeightSource) -> list[NonFinite]:
    """Every tensor that holds NaN or infinity, read in chunks; empty for a sound source."""
    found = []
    for info in source.tensors.values():
        if isinstance(source, GgufFile) and _scales_are_finite(source, info):
            continue
        count, first, at = 0, -1, 0
        for values in chunks_of_rows(source, info):
            finite = np.isfinite(values).reshape(-1)
            if not finite.all():
                if first < 0:
                    first = at + int(np.argmin(finite))
                count += int(finite.size - np.count_nonzero(finite))
            at += finite.size
        if count:
            found.append(NonFinite(info.name, count, first))
    return found


def _scales_are_finite(source: GgufFile, info: TensorInfo) -> bool:
    """Whether a quantized tensor is known to be finite by its scales alone, some 2% of its bytes."""
    if info.type not in SCALES:
        return False
    blocks = source.raw(info.name).reshape(-1, BLOCKS[info.type][1])
    # A float16 is infinite or NaN if its five exponent bits, all in the upper byte, are set.
    finite = all(((blocks[:, at + 1] & 0x7C) != 0x7C).all() for at in SCALES[info.type])
    source.release(info.name)
    return finite


def _some(items: Sequence[str]) -> str:
    return listed(items, _NAMED, "; ")
