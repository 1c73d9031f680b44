"""`GgufFile`: an artifact as a `WeightSource`, memory-mapped, single or split into shards.

The header is read by `gguf_header`, which trusts nothing. Tensor bytes stay in the file until they
are asked for, and the pages of a large tensor are given back as soon as it was dequantized, so that
walking through a model costs the memory of one tensor.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.errors import ArtifactFileError, UnsupportedError
from diffharness.weights import pread
from diffharness.weights.dequant import byte_size, dequantize
from diffharness.weights.gguf_header import Header, TensorEntry, parse_header
from diffharness.weights.gguf_values import Buffer, KvEntry, decode_kv
from diffharness.weights.source import Float32Array, IntArray, Metadata, TensorInfo
from diffharness.words import are, listed

_SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_SHARDS = 99999
_RELEASE_FROM = 1 << 20  # bytes


class _Shard:
    """One mapped file and its header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("rb")
            size = self.file.seek(0, 2)
            # An empty file cannot be mapped; the parser then says what is wrong with it.
            self.map: Buffer = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except FileNotFoundError as error:
            raise UnsupportedError(f"{path}: no such file", hint="check the path") from error
        except IsADirectoryError as error:
            raise UnsupportedError(
                f"{path} is a folder, expected a .gguf file", hint="give a folder as --checkpoint"
            ) from error
        except (OSError, ValueError) as error:
            raise UnsupportedError(f"{path}: cannot be read: {error}") from error
        try:
            self.header: Header = parse_header(self.map, path.name)
        except ArtifactFileError:
            self.close()
            raise

    def view(self, entry: TensorEntry) -> NDArray[np.uint8]:
        return np.frombuffer(self.map, dtype=np.uint8, count=entry.n_bytes, offset=entry.start)

    def floats(self, entry: TensorEntry, first: int, n_rows: int) -> Float32Array:
        """Rows of an F32 tensor."""
        row_bytes = entry.n_bytes // max(1, entry.shape[0])
        try:
            return pread.read_float32(self.file.fileno(), entry.start + first * row_bytes, (n_rows, *entry.shape[1:]))
        except (EOFError, OSError) as error:
            raise ArtifactFileError(f"{self.path}: tensor {entry.name} cannot be read: {error}") from error

    def release(self, start: int, n_bytes: int) -> None:
        """Let go of the resident pages inside of a range; they stay in the system's cache."""
        if n_bytes >= _RELEASE_FROM and isinstance(self.map, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            page = mmap.PAGESIZE
            first = -(-start // page) * page
            self.map.madvise(mmap.MADV_DONTNEED, first, (start + n_bytes) // page * page - first)

    def close(self) -> None:
        self.file.close()
        if isinstance(self.map, mmap.mmap):
            try:
                self.map.close()
            except BufferError:  # a view of raw bytes is still in use; the map goes when it does
                return


class KvView(Mapping[str, Any]):
    """Metadata decoded on first use: opening a file does not decode its vocabulary."""

    def __init__(self, data: Buffer, entries: Mapping[str, KvEntry]) -> None:
        self._data, self._entries = data, entries
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            self._values[key] = decode_kv(self._data, self._entries[key])
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries


class GgufFile:
    """A GGUF file; of a split one give any shard. Raises ArtifactFileError for whatever is wrong with it.

    A large tensor is dequantized in up to `threads` threads, of all usable cores where that is left open.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.threads = threads
        first = _Shard(Path(path))
        self._shards = [first]
        try:
            self._open_siblings(first)
            self.path = self._shards[0].path
            self.label = self.path.name
            self._entries: dict[str, tuple[_Shard, TensorEntry]] = {}
            for shard in self._shards:
                self._add_tensors(shard)
            self._kvs: Mapping[str, KvEntry] = self._shards[0].header.kvs
            self._metadata = KvView(self._shards[0].map, self._kvs)
            self._arch = self._read_arch()
            self._check_split_total()
        except ArtifactFileError:
            self.close()
            raise
        self._tensors = {
            name: TensorInfo(name, entry.shape, entry.type, entry.n_bytes) for name, (_, entry) in self._entries.items()
        }
        self._sha256: str | None = None

    # ── opening ──────────────────────────────────────────────────────────────────────────────────

    def _open_siblings(self, given: _Shard) -> None:
        count = _int(given, "split.count", default=1)
        if count <= 1:
            return
        match = _SHARD.fullmatch(given.path.name)
        if match is None or int(match["count"]) != count or count > _MAX_SHARDS:
            raise ArtifactFileError(
                f"{given.path.name}: the file says that it is one of {count} shards, expected a name like "
                f"model-00001-of-{count:05d}.gguf",
                hint="give the shards the names that they were published with, or merge them",
            )
        paths = [given.path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
        missing = [p.name for p in paths if not p.exists()]
        if missing:
            raise ArtifactFileError(
                f"{given.path.name}: {len(missing)} of its {count} shards {are(len(missing))} missing: "
                + listed(missing, 5),
                hint=f"put all shards into {given.path.parent}",
            )
        self._shards = []
        for i, path in enumerate(paths):
            shard = given if path == given.path else _Shard(path)
            self._shards.append(shard)
            if (_int(shard, "split.count", default=1), _int(shard, "split.no", default=0)) != (count, i):
                raise ArtifactFileError(f"{path.name}: expected shard {i} of {count} by its metadata (split.no)")

    def _add_tensors(self, shard: _Shard) -> None:
        for name, entry in shard.header.tensors.items():
            if name in self._entries:
                raise ArtifactFileError(f"{shard.path.name}: tensor {name} is in another shard too", tensor=name)
            self._entries[name] = (shard, entry)

    def _check_split_total(self) -> None:
        total = _int(self._shards[0], "split.tensors.count", default=len(self._entries))
        if len(self._shards) > 1 and total != len(self._entries):
            raise ArtifactFileError(
                f"{self.label}: expected {total} tensors in all shards, found {len(self._entries)}",
                hint="the shards are not of one model",
            )

    def _read_arch(self) -> str:
        entry = self._kvs.get("general.architecture")
        if entry is None or entry.type != "STRING":
            raise ArtifactFileError(
                f"{self.label}: expected a string general.architecture, "
                + (f"found {entry.type}" if entry else "found none"),
                hint="the file is not a language model, or was not finished",
            )
        return str(self._metadata["general.architecture"])

    # ── WeightSource ─────────────────────────────────────────────────────────────────────────────

    @property
    def arch(self) -> str:
        return self._arch

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> Float32Array:
        shard, entry = self._entries[name]
        if entry.type == "F32" and pread.AVAILABLE and entry.shape:
            return shard.floats(entry, 0, entry.shape[0])
        values = dequantize(shard.view(entry), entry.type, entry.shape, tensor=name, threads=self.threads)
        shard.release(entry.start, entry.n_bytes)
        return values

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        shard, entry = self._entries[name]
        if len(entry.shape) == 1:
            return np.ascontiguousarray(self.read(name)[rows])
        part = pread.contiguous(rows, entry.shape[0])
        if entry.type == "F32" and pread.AVAILABLE and part is not None:
            return shard.floats(entry, *part)
        bytes_of_rows = shard.view(entry).reshape(entry.shape[0], -1)[rows]
        shape = (bytes_of_rows.shape[0], *entry.shape[1:])
        raw = np.ascontiguousarray(bytes_of_rows)
        values = dequantize(raw, entry.type, shape, tensor=name, threads=self.threads)
        if bytes_of_rows.nbytes >= _RELEASE_FROM:
            shard.release(entry.start, entry.n_bytes)
        return values

    # ── beyond WeightSource ──────────────────────────────────────────────────────────────────────

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as stored: a read-only view into the file, 1-D."""
        shard, entry = self._entries[name]
        return shard.view(entry)

    def release(self, name: str) -> None:
        """Let go of the memory of a large tensor whose `raw` bytes are no longer needed."""
        shard, entry = self._entries[name]
        shard.release(entry.start, entry.n_bytes)

    def tensor_offset(self, name: str) -> tuple[Path, int]:
        """The file and the byte at which the tensor begins."""
        shard, entry = self._entries[name]
        return shard.path, entry.start

    def kv_raw(self) -> dict[str, bytes]:
        """Every KV's encoded value (type number and value), for carrying over to the bit."""
        data = self._shards[0].map
        return {key: bytes(data[entry.start : entry.end]) for key, entry in self._kvs.items()}

    @property
    def kv_types(self) -> dict[str, str]:
        """GGUF value type of every key: `UINT32`, `STRING`, `ARRAY[INT32]`, ..."""
        return {k: f"ARRAY[{e.item_type}]" if e.item_type else e.type for k, e in self._kvs.items()}

    @property
    def alignment(self) -> int:
        return self._shards[0].header.alignment

    @property
    def paths(self) -> list[Path]:
        """The file, or all of its shards."""
        return [shard.path for shard in self._shards]

    @property
    def n_bytes(self) -> int:
        """Size of the file, or of all of its shards."""
        return sum(len(shard.map) for shard in self._shards)

    @property
    def types(self) -> dict[str, int]:
        """How many tensors have each type, the most frequent first."""
        return dict(Counter(info.type for info in self._tensors.values()).most_common())

    @property
    def vocab_size(self) -> int:
        """Number of tokens: the vocabulary's, else `<arch>.vocab_size`, else the embedding's rows."""
        tokens = self._kvs.get("tokenizer.ggml.tokens")
        if tokens is not None and tokens.type == "ARRAY":
            return tokens.count
        key = f"{self._arch}.vocab_size"
        if key in self._kvs:
            return _int(self._shards[0], key, default=0)
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise ArtifactFileError(
                f"{self.label}: no vocabulary, no {key} and no token_embd.weight", tensor="token_embd.weight"
            )
        return embedding.shape[0]

    def sha256(self) -> str:
        """Hash of the file's bytes, of a split file those of all shards in order; computed once."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            for shard in self._shards:
                with shard.path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            self._sha256 = digest.hexdigest()
        return self._sha256

    def close(self) -> None:
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_gguf(path: str | Path, *, threads: int | None = None) -> GgufFile:
    """The artifact at `path`, which may be any shard of a split file; `threads` are for dequantizing."""
    return GgufFile(path, threads=threads)


def row_bytes(info: TensorInfo) -> int:
    """Stored bytes of one entry of the first axis."""
    return byte_size(info.type, (1, *info.shape[1:])) if len(info.shape) > 1 else info.n_bytes // info.shape[0]


def _int(shard: _Shard, key: str, *, default: int) -> int:
    entry = shard.header.kvs.get(key)
    if entry is None:
        return default
    value = decode_kv(shard.map, entry) if entry.type != "ARRAY" else None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArtifactFileError(f"{shard.path.name}: {key} must be an integer, found {entry.type}", offset=entry.start)
    return value
