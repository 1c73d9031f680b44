"""The header of a GGUF file, read with a bound check before every step.

Files come from strangers: no count, length or offset is believed before it was held against the
bytes that are there, and nothing is allocated that the file itself does not fill. Arrays (a
vocabulary can have a million strings) are only walked over; their values are decoded on request.

Layout, little-endian (ggml/docs/gguf.md): magic, version u32, tensor count u64, KV count u64, the
KVs (key, type u32, value), the tensor infos (name, n_dims u32, dims u64 innermost first, type u32,
offset u64), padding to `general.alignment`, tensor data. A string is a u64 length and its bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from diffharness.errors import ArtifactFileError, UnsupportedError
from diffharness.weights.dequant import BLOCKS, TYPE_NAMES
from diffharness.weights.gguf_values import ARRAY, U64, VALUE_TYPES, Buffer, KvEntry, decode_kv

DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_NAME = 63  # ggml keeps names in 64 bytes with a closing zero
_MIN_KV = 8 + 1 + 4 + 1  # key length, one byte of key, type, one byte of value
_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8

_OTHER_FORMATS = (
    (b"ggml", "an old llama.cpp file (GGML); convert it to GGUF again"),
    (b"tjgg", "an old llama.cpp file (GGJT); convert it to GGUF again"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<", "a web page, not the file itself; download it again"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint; give a .gguf file"),
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor info: `shape` in numpy's order, `start` absolute in the file, `n_bytes` checked against it."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    version: int
    alignment: int
    kvs: dict[str, KvEntry]
    tensors: dict[str, TensorEntry]  # in the file's order
    data_start: int


def parse_header(data: Buffer, label: str) -> Header:
    """Header of the GGUF whose bytes are `data`; ArtifactFileError with the offset of what is wrong."""
    return _Reader(data, label).header()


class _Reader:
    """A cursor over the file that refuses to step past its end."""

    def __init__(self, data: Buffer, label: str) -> None:
        self.data, self.label, self.size, self.at = data, label, len(data), 0

    def fail(
        self, message: str, *, offset: int | None = None, hint: str | None = None, tensor: str | None = None
    ) -> ArtifactFileError:
        where = self.at if offset is None else offset
        return ArtifactFileError(
            f"{self.label}: at byte {where}: {message}",
            hint=hint or "the file is damaged or was cut off: compare its size and hash, download or convert it again",
            offset=where,
            tensor=tensor,
        )

    def need(self, n: int, what: str) -> None:
        if n > self.size - self.at:
            raise self.fail(f"expected {n} bytes of {what}, found the end of the file at {self.size}")

    def u32(self, what: str) -> int:
        self.need(4, what)
        value: int = struct.unpack_from("<I", self.data, self.at)[0]
        self.at += 4
        return value

    def u64(self, what: str) -> int:
        self.need(8, what)
        value: int = U64.unpack_from(self.data, self.at)[0]
        self.at += 8
        return value

    def string(self, what: str) -> str:
        begin = self.at
        length = self.u64(f"the length of {what}")
        self.need(length, what)
        raw = bytes(self.data[self.at : self.at + length])
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error.reason}", offset=begin + 8) from error

    # ── the parts, in the order of the file ──────────────────────────────────────────────────────

    def header(self) -> Header:
        version = self._magic_and_version()
        n_tensors = self._count("tensors", _MIN_TENSOR)
        n_kv = self._count("metadata keys", _MIN_KV)
        kvs: dict[str, KvEntry] = {}
        for _ in range(n_kv):
            begin = self.at
            entry = self._kv()
            if entry.key in kvs:
                raise self.fail(f"metadata key {entry.key!r} is there twice", offset=begin)
            kvs[entry.key] = entry
        alignment = self._alignment(kvs)
        pending: dict[str, tuple[tuple[int, ...], str, int, int, int]] = {}
        for _ in range(n_tensors):
            begin = self.at
            name, rest = self._tensor_info(alignment)
            if name in pending:
                raise self.fail(f"tensor {name!r} is there twice", offset=begin, tensor=name)
            pending[name] = rest
        data_start = -(-self.at // alignment) * alignment
        return Header(version, alignment, kvs, self._place(pending, data_start), data_start)

    def _magic_and_version(self) -> int:
        magic = bytes(self.data[:4])
        if magic != b"GGUF":
            head = bytes(self.data[:24])
            looks = next((text for start, text in _OTHER_FORMATS if head.startswith(start)), None)
            found = f"found {magic!r}" if magic else "the file is empty"
            raise self.fail(
                f"expected the four letters GGUF, {found}",
                hint=f"this looks like {looks}" if looks else "this is not a GGUF file",
            )
        self.at = 4
        version = self.u32("the version")
        if version in (2, 3):
            return version
        if version == 1:
            hint = "version 1 is no longer read by llama.cpp either: convert the model again"
        elif version & 0xFFFF == 0:
            hint = "this looks like a big-endian file: convert it with gguf_convert_endian"
        else:
            hint = "the file is damaged, or newer than this program"
        raise self.fail(f"expected GGUF version 2 or 3, found {version}", offset=4, hint=hint)

    def _count(self, what: str, least: int) -> int:
        count = self.u64(f"the number of {what}")
        if count * least > self.size:
            raise self.fail(
                f"{count} {what} are announced, but the file has only {self.size} bytes", offset=self.at - 8
            )
        return count

    def _value_type(self, what: str) -> int:
        number = self.u32(f"the type of {what}")
        if number not in VALUE_TYPES:
            raise self.fail(f"{what} has the unknown value type {number}; known are 0 to 12", offset=self.at - 4)
        return number

    def _kv(self) -> KvEntry:
        key = self.string("a metadata key")
        if not key:
            raise self.fail("a metadata key is empty", offset=self.at - 8)
        what = f"metadata key {key[:80]!r}"
        start = self.at
        number = self._value_type(what)
        name, code = VALUE_TYPES[number]
        item_type, count = None, 1
        if number == ARRAY:
            item = self._value_type(f"the items of {what}")
            item_type, item_code = VALUE_TYPES[item]
            if item == ARRAY:
                raise self.fail(f"{what} is an array of arrays, which GGUF readers do not support", offset=start)
            count = self.u64(f"the length of {what}")
            self._skip_items(count, item_code, what)
        elif code is None:
            length = self.u64(f"the length of {what}")
            self.need(length, what)
            self.at += length
        else:
            size = struct.calcsize(code)
            self.need(size, what)
            self.at += size
        return KvEntry(key, name, item_type, count, start, self.at)

    def _skip_items(self, count: int, code: str | None, what: str) -> None:
        least = struct.calcsize(code) if code else 8
        self.need(count * least, f"the {count} items of {what}")
        if code:
            self.at += count * least
            return
        at, size, data, unpack = self.at, self.size, self.data, U64.unpack_from
        for i in range(count):  # the hot loop of opening a file with a large vocabulary
            if at + 8 > size:
                raise self.fail(f"item {i} of {what} lies past the end of the file at {size}")
            at += 8 + unpack(data, at)[0]
        if at > size:  # a too long string can only be the last that was stepped over
            raise self.fail(f"{what} reaches past the end of the file at {size}")
        self.at = at

    def _alignment(self, kvs: dict[str, KvEntry]) -> int:
        entry = kvs.get("general.alignment")
        if entry is None:
            return DEFAULT_ALIGNMENT
        if entry.type != "UINT32":
            raise self.fail(f"general.alignment must be UINT32, found {entry.type}", offset=entry.start)
        alignment: int = decode_kv(self.data, entry)
        if alignment == 0 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment must be a power of two, found {alignment}", offset=entry.start + 4)
        return alignment

    def _tensor_info(self, alignment: int) -> tuple[str, tuple[tuple[int, ...], str, int, int, int]]:
        begin = self.at
        name = self.string("a tensor name")
        if not name or len(name.encode()) > _MAX_NAME:
            raise self.fail(f"tensor name {name[:80]!r} must have 1 to {_MAX_NAME} bytes", offset=begin)
        n_dims = self.u32(f"the dimensions of tensor {name}")
        if n_dims > _MAX_DIMS:
            raise self.fail(
                f"tensor {name} has {n_dims} dimensions, more than {_MAX_DIMS}", offset=self.at - 4, tensor=name
            )
        dims = [self.u64(f"a dimension of tensor {name}") for _ in range(n_dims)]
        number = self.u32(f"the type of tensor {name}")
        if number not in TYPE_NAMES:
            raise UnsupportedError(
                f"{self.label}: tensor {name} has the unknown type {number}; known are {', '.join(BLOCKS)}",
                offset=self.at - 4,
                hint="the file is damaged, or its type is newer than the installed gguf package",
                tensor=name,
            )
        type_name = TYPE_NAMES[number]
        offset = self.u64(f"the offset of tensor {name}")
        shape = tuple(reversed(dims)) or (1,)
        n_bytes = self._tensor_bytes(name, shape, type_name, begin)
        if offset % alignment:
            raise self.fail(
                f"tensor {name}: its offset {offset} is not a multiple of the alignment {alignment}",
                offset=self.at - 8,
                tensor=name,
            )
        return name, (shape, type_name, offset, n_bytes, self.at - 8)

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], type_name: str, begin: int) -> int:
        block, size = BLOCKS[type_name]
        n = 1
        for length in shape:
            n *= length
        if n == 0 or n >= 1 << 63:
            raise self.fail(f"tensor {name} of shape {shape} has {n} elements", offset=begin, tensor=name)
        if shape[-1] % block:
            raise self.fail(
                f"tensor {name}: rows of {shape[-1]} elements are not made of whole {type_name} blocks of {block}",
                offset=begin,
                tensor=name,
            )
        return n // block * size

    def _place(
        self, pending: dict[str, tuple[tuple[int, ...], str, int, int, int]], data_start: int
    ) -> dict[str, TensorEntry]:
        tensors = {}
        previous_end, previous = 0, ""
        for name, (shape, type_name, offset, n_bytes, at) in sorted(pending.items(), key=lambda item: item[1][2]):
            start = data_start + offset
            if start + n_bytes > self.size:
                raise self.fail(
                    f"tensor {name} ({type_name}, shape {shape}) should lie in bytes {start} to {start + n_bytes}, "
                    f"but the file ends at {self.size}",
                    offset=at,
                    tensor=name,
                )
            if offset < previous_end:
                raise self.fail(f"tensor {name} overlaps tensor {previous}", offset=at, tensor=name)
            previous_end, previous = offset + n_bytes, name
            tensors[name] = TensorEntry(name, shape, type_name, start, n_bytes)
        return {name: tensors[name] for name in pending}
