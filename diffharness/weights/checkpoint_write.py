"""A source in GGUF's terms as a Hugging Face folder: `config.json` and one `model.safetensors`, streamed.

The safetensors library wants all tensors in memory at once, so the file is written here: a u64
header length, a JSON header of dtype, shape and offsets, and the bytes (safetensors' README).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffharness.errors import ArtifactFileError, OutputError, UnsupportedError
from diffharness.weights import names
from diffharness.weights.checkpoint_files import SINGLE
from diffharness.weights.gguf_write import Bytes, chunks_of_rows, encode_floats
from diffharness.weights.names._map import AddOne, Layout, Piece, Plain, RotaryPairs, Stack, TensorRule
from diffharness.weights.output import check_space, whole_file
from diffharness.weights.source import TensorInfo, WeightSource

_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ALIGNED = 8  # safetensors pads its header to this


@dataclass(frozen=True)
class _Planned:
    """One GGUF tensor and the Hugging Face tensors that it becomes, or the first of several that make one."""

    info: TensorInfo
    rule: TensorRule
    shapes: tuple[tuple[int, ...], ...]
    others: tuple[TensorRule, ...] = ()  # of the same Hugging Face tensor, where each is a piece of it


def write_checkpoint(
    folder: str | Path, source: WeightSource, *, dtype: str = "F32", config: Mapping[str, Any] | None = None
) -> list[str]:
    """Write `source` as a checkpoint with tensors of `dtype` (F32, F16, BF16); returns what was left out.

    `config` is what config.json is to say; without it that follows from the metadata, for architectures whose map can.

    Left out are tensors that the architecture's map does not know or that are computed from the
    config. Raises ArtifactFileError for an unknown architecture or a tensor that is missing or
    misshapen, OutputError where the folder cannot be written.
    """
    if dtype not in _SIZES:
        raise ValueError(f"{dtype} is not a type of checkpoints; known are {', '.join(_SIZES)}")
    arch_map = names.for_arch(source.arch)
    planned, left_out = _plan(source, arch_map.rules(source.metadata))
    if config is None:
        if arch_map.config is None:
            raise UnsupportedError(f"{source.label}: no config.json can be made of a {source.arch} model's metadata")
        config = names.config_of_tensors(arch_map.config(source.metadata), source.tensors)
    config = {**config, "dtype": _TORCH_NAMES[dtype]}
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target}: cannot be made: {error.strerror}", hint="choose another place") from error
    header, total = _header(planned, dtype)
    check_space(target, total)
    with whole_file(target / SINGLE, len(header) + total) as file:
        file.write(header)
        for item in planned:
            for piece in _pieces(source, item, dtype):
                file.write(piece.data)
    with whole_file(target / "config.json") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    return left_out


def _plan(source: WeightSource, rules: list[TensorRule]) -> tuple[list[_Planned], list[str]]:
    by_name = {rule.name: rule for rule in rules}
    planned: list[_Planned] = []
    left_out: list[str] = []
    for name, info in source.tensors.items():
        rule = by_name.get(name)
        if rule is None or not rule.hf:
            left_out.append(name)
        elif tuple(rule.shape) != info.shape:
            raise ArtifactFileError(
                f"{source.label}: tensor {name} has shape {info.shape}, expected {tuple(rule.shape)}", tensor=name
            )
        else:
            others = _other_pieces(rule, rules, source)
            if any(item.rule in others for item in planned):
                continue
            planned.append(_Planned(info, rule, _shapes(source, info, rule.layout, len(rule.hf)), others))
    missing = [rule.name for rule in rules if rule.required and not rule.values and rule.name not in source.tensors]
    if missing:
        raise ArtifactFileError(f"{source.label}: tensor {missing[0]} is missing", tensor=missing[0])
    return planned, left_out


def _other_pieces(rule: TensorRule, rules: list[TensorRule], source: WeightSource) -> tuple[TensorRule, ...]:
    """The rules beside `rule` whose tensors are pieces of the same Hugging Face tensor."""
    if not isinstance(rule.layout, Piece):
        return ()
    return tuple(r for r in rules if r.hf == rule.hf and r.name != rule.name and r.name in source.tensors)


def _shapes(source: WeightSource, info: TensorInfo, layout: Layout, n: int) -> tuple[tuple[int, ...], ...]:
    if isinstance(layout, Stack):
        return (info.shape[1:],) * n
    if isinstance(layout, Piece):
        return (layout.hf,)
    if isinstance(layout, Plain | AddOne | RotaryPairs):
        return (info.shape,)
    return tuple(part.shape for part in layout.to_hf(source.read(info.name)))


def _header(planned: list[_Planned], dtype: str) -> tuple[bytes, int]:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in planned:
        for name, shape in zip(item.rule.hf, item.shapes, strict=True):
            end = at + _SIZES[dtype] * int(np.prod(shape))
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % _ALIGNED)
    return struct.pack("<Q", len(raw)) + raw, at


def _pieces(source: WeightSource, item: _Planned, dtype: str) -> Iterator[Bytes]:
    if isinstance(item.rule.layout, Plain):
        for values in chunks_of_rows(source, item.info):
            yield encode_floats(values, dtype)
    elif isinstance(item.rule.layout, Stack):
        for expert in range(item.info.shape[0]):
            yield encode_floats(source.take(item.info.name, slice(expert, expert + 1)), dtype)
    else:
        parts = item.rule.layout.to_hf(source.read(item.info.name))
        for other in item.others:
            assert isinstance(other.layout, Piece)
            other.layout.put(source.read(other.name), parts[0])
        for part in parts:
            yield encode_floats(part, dtype)
