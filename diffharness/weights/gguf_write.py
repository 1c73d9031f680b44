"""Writing GGUF files, tensor by tensor: strict files, checkpoints as GGUF, changed copies.

`gguf.GGUFWriter` is not used: it drops empty strings and arrays and guesses the types of arrays
anew, so it cannot carry metadata over to the bit, which a strict file must. The order of tensors is
the source's, offsets are packed as llama.cpp demands.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from diffharness.errors import OutputError
from diffharness.weights.dequant import TYPE_IDS, byte_size
from diffharness.weights.gguf_file import GgufFile
from diffharness.weights.gguf_header import DEFAULT_ALIGNMENT
from diffharness.weights.gguf_values import encode_string, encode_value
from diffharness.weights.output import whole_file
from diffharness.weights.source import Float32Array, TensorInfo, WeightSource

Bytes = NDArray[np.uint8]

# llama_ftype of the whole file, by the type of its matrices (llama.h)
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
_INTEGERS = ("I8", "I16", "I32", "I64")  # indices, not weights: never converted
# Parts of the names of matrices that llama.cpp keeps F32, besides vectors.
_ALWAYS_F32 = (
    "ffn_gate_inp", "ssm_a", "ssm_conv1d", "shortconv.conv", "position_embd", "altup", "laurel", "per_layer_model_proj",
)  # fmt: skip
_CHUNK = 1 << 23  # elements converted at a time


@dataclass(frozen=True)
class RawTensor:
    """One tensor to write: its bytes come from `data`, whose pieces must sum up to its size."""

    name: str
    shape: tuple[int, ...]  # numpy order
    type: str
    data: Callable[[], Iterable[Bytes]]

    @property
    def n_bytes(self) -> int:
        return byte_size(self.type, self.shape)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


def encode_floats(values: Float32Array, type_name: str) -> Bytes:
    """float32 values as bytes of F32, F16 or BF16 (round to nearest, ties to even; NaN stays NaN)."""
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    if type_name == "F32":
        return flat.view(np.uint8)
    if type_name == "F16":
        with np.errstate(over="ignore"):  # too large for float16 is infinite there, as in ggml
            return flat.astype(np.float16).view(np.uint8)
    if type_name == "BF16":
        return to_bf16(flat).view(np.uint8)
    raise ValueError(f"{type_name} is not a float type that can be written; known are F32, F16, BF16")


def to_bf16(values: Float32Array) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest, ties to even; a NaN is kept, and quiet."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        rounded[nan] = ((bits[nan] >> 16) | 64).astype(np.uint16)
    return rounded


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


def write_tensors(
    path: str | Path, kvs: Mapping[str, bytes], tensors: Sequence[RawTensor], alignment: int = DEFAULT_ALIGNMENT
) -> None:
    """A GGUF file of encoded KVs and tensors, streamed; OutputError where it cannot be written."""
    header = _header(kvs, tensors, alignment)
    total = len(header) + sum(_padded(t.n_bytes, alignment) for t in tensors)
    with whole_file(Path(path), total) as file:
        file.write(header)
        for tensor in tensors:
            _write_data(file, tensor)
            file.write(b"\0" * (_padded(tensor.n_bytes, alignment) - tensor.n_bytes))


def _header(kvs: Mapping[str, bytes], tensors: Sequence[RawTensor], alignment: int) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(kvs))]
    for key, encoded in kvs.items():
        parts += [encode_string(key), encoded]
    offset = 0
    for t in tensors:
        parts.append(encode_string(t.name))
        parts.append(struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *reversed(t.shape)))
        parts.append(struct.pack("<IQ", TYPE_IDS[t.type], offset))
        offset += _padded(t.n_bytes, alignment)
    raw = b"".join(parts)
    return raw + b"\0" * (_padded(len(raw), alignment) - len(raw))


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _write_data(file: BinaryIO, tensor: RawTensor) -> None:
    written = 0
    for piece in tensor.data():
        file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        written += piece.nbytes
    if written != tensor.n_bytes:
        raise OutputError(
            f"tensor {tensor.name} ({tensor.type}, shape {tensor.shape}): "
            f"expected {tensor.n_bytes} bytes, got {written}"
        )


# ── a source as GGUF ─────────────────────────────────────────────────────────────────────────────


def write_gguf(
    path: str | Path,
    source: WeightSource,
    *,
    type_of: Callable[[TensorInfo], str],
    extra_metadata: Mapping[str, Any] | None = None,
    kv_from: GgufFile | None = None,
) -> None:
    """Write `source` as one GGUF file whose tensors have the types that `type_of` says.

    F32, F16 and BF16 are converted to; a tensor whose type stays the same is copied to the bit where
    the source has raw bytes. Vectors, single values and expert routers stay F32 whatever `type_of`
    says, as llama.cpp's own converter has it. Metadata is `kv_from`'s carried over bit by bit (the
    keys of splitting dropped), else the source's; `extra_metadata` is added or replaces.
    """
    tensors = [_converted(source, info, type_of(info)) for info in source.tensors.values()]
    if kv_from is not None:
        kvs, types = kv_from.kv_raw(), kv_from.kv_types
    else:
        kvs = {key: encode_value(key, value) for key, value in source.metadata.items()}
        types = {}
    changes: dict[str, Any] = {**_file_type(tensors), **(extra_metadata or {})}
    kvs = _changed(kvs, types, changes)
    write_tensors(path, kvs, tensors, kv_from.alignment if kv_from is not None else DEFAULT_ALIGNMENT)


def _changed(kvs: Mapping[str, bytes], types: Mapping[str, str], changes: Mapping[str, Any]) -> dict[str, bytes]:
    """`kvs` without the split keys, with `changes` in place or at the end; a change to None removes."""
    kept = {k: v for k, v in kvs.items() if not k.startswith("split.")}
    for key, value in changes.items():
        if value is None:
            kept.pop(key, None)
        else:
            kept[key] = encode_value(key, value, types.get(key))
    # llama.cpp's tools and people expect the architecture first.
    first = {k: kept[k] for k in ("general.architecture",) if k in kept}
    return {**first, **kept}


def _file_type(tensors: Sequence[RawTensor]) -> dict[str, int]:
    """`general.file_type`, where the matrices are all of one float type; else nothing is claimed."""
    kinds = {t.type for t in tensors if len(t.shape) > 1 and not stays_f32(t.name, t.shape)}
    kind = kinds.pop() if len(kinds) == 1 else None
    return {"general.file_type": _FILE_TYPES[kind]} if kind in _FILE_TYPES else {}


def stays_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp's converter and quantizer leave a tensor F32: vectors, routers, biases of experts, ..."""
    if len(shape) == 1 or not name.endswith(".weight") or name.endswith("_norm.weight"):
        return True
    return any(stem in name for stem in _ALWAYS_F32)


def _converted(source: WeightSource, info: TensorInfo, type_name: str) -> RawTensor:
    raw: Callable[[str], Bytes] | None = getattr(source, "raw", None)
    wanted = "F32" if stays_f32(info.name, info.shape) and type_name in _FILE_TYPES else type_name
    if raw is not None and (wanted == info.type or info.type in _INTEGERS):
        return RawTensor(info.name, info.shape, info.type, lambda: [raw(info.name)])
    if wanted not in _FILE_TYPES:
        raise ValueError(f"{info.name}: cannot convert {info.type} to {wanted}; known are {', '.join(_FILE_TYPES)}")
    return RawTensor(info.name, info.shape, wanted, lambda: _pieces(source, info, wanted))


def _pieces(source: WeightSource, info: TensorInfo, type_name: str) -> Iterator[Bytes]:
    for values in chunks_of_rows(source, info):
        yield encode_floats(values, type_name)


def chunks_of_rows(source: WeightSource, info: TensorInfo) -> Iterator[Float32Array]:
    """The tensor from its first row to its last, some 32 MiB at a time."""
    rows = info.shape[0]
    step = max(1, _CHUNK * rows // info.n_elements)
    if step >= rows or len(info.shape) == 1:
        yield source.read(info.name)
        return
    for first in range(0, rows, step):
        yield source.take(info.name, slice(first, min(first + step, rows)))


# ── a changed copy ───────────────────────────────────────────────────────────────────────────────

NewTensor = tuple[str, tuple[int, ...], Bytes]  # type, numpy shape, raw bytes


def rewrite_gguf(
    source: GgufFile,
    path: str | Path,
    *,
    tensor: Callable[[TensorInfo, Bytes], NewTensor | None] = lambda info, raw: None,
    kv: Mapping[str, Any] | None = None,
    without: Iterable[str] = (),
) -> None:
    """A copy of `source` with some tensors and KVs changed, everything else to the bit.

    `tensor(info, raw)` gives what replaces a tensor, or None to keep it; it is called twice, once to
    plan and once to write, so it must be a function of its arguments. `kv` replaces or adds values
    (in the type that the key has) and removes a key where the value is None; `without` names
    tensors to leave out.
    """
    left_out = set(without)
    tensors = [_replaced(source, info, tensor) for info in source.tensors.values() if info.name not in left_out]
    kvs = _changed(source.kv_raw(), source.kv_types, kv or {})
    write_tensors(path, kvs, tensors, source.alignment)


def _replaced(source: GgufFile, info: TensorInfo, change: Callable[[TensorInfo, Bytes], NewTensor | None]) -> RawTensor:
    new = change(info, source.raw(info.name))
    if new is None:
        return RawTensor(info.name, info.shape, info.type, lambda: [source.raw(info.name)])
    type_name, shape, _ = new

    def data() -> list[Bytes]:
        again = change(info, source.raw(info.name))
        return [] if again is None else [again[2]]

    return RawTensor(info.name, shape, type_name, data)
