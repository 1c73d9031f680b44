"""GGUF's metadata values: their types, and their bytes read and written, to the bit."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Buffer = bytes | mmap.mmap

STRING, ARRAY = 8, 9
# GGUF's value types by number: name, and struct code where the size is fixed
VALUE_TYPES: dict[int, tuple[str, str | None]] = {
    0: ("UINT8", "B"),
    1: ("INT8", "b"),
    2: ("UINT16", "H"),
    3: ("INT16", "h"),
    4: ("UINT32", "I"),
    5: ("INT32", "i"),
    6: ("FLOAT32", "f"),
    7: ("BOOL", "?"),
    STRING: ("STRING", None),
    ARRAY: ("ARRAY", None),
    10: ("UINT64", "Q"),
    11: ("INT64", "q"),
    12: ("FLOAT64", "d"),
}
U64 = struct.Struct("<Q")
_NUMBERS = {name: number for number, (name, _) in VALUE_TYPES.items()}
_CODES = {name: code for name, code in VALUE_TYPES.values()}
# llama.cpp is strict about types: a key that it reads as a float must not be written as an integer,
# and configs do say `"rope_theta": 10000`.
_FLOAT_KEYS = (
    "epsilon",
    "freq_base",
    "freq_base_swa",
    "softcapping",
    "scale",
    "factor",
    "logit_scale",
    "clamp_kqv",
    "beta_fast",
    "beta_slow",
    "multiplier",
)


@dataclass(frozen=True)
class KvEntry:
    """One KV: where its value lies; `start` is the offset of the type number, `end` one past the value."""

    key: str
    type: str  # UINT32, STRING, ARRAY, ...
    item_type: str | None  # of an array
    count: int  # of an array; 1 otherwise
    start: int
    end: int


def decode_kv(data: Buffer, entry: KvEntry) -> Any:
    """The value of a KV: int, float, bool, str, or a list of those (lenient with broken UTF-8)."""
    if entry.type == "ARRAY":
        return _decode_array(data, entry)
    if entry.type == "STRING":
        return bytes(data[entry.start + 12 : entry.end]).decode("utf-8", errors="replace")
    code = _code(entry.type)
    return struct.unpack_from("<" + code, data, entry.start + 4)[0]


def _decode_array(data: Buffer, entry: KvEntry) -> list[Any]:
    start = entry.start + 16  # type, item type, count
    if entry.item_type == "STRING":
        strings: list[Any] = []
        for _ in range(entry.count):
            (length,) = U64.unpack_from(data, start)
            strings.append(bytes(data[start + 8 : start + 8 + length]).decode("utf-8", errors="replace"))
            start += 8 + length
        return strings
    code = _code(entry.item_type or "")
    values = np.frombuffer(bytes(data[start : entry.end]), dtype=np.dtype("<" + code if code != "?" else code))
    result: list[Any] = values.tolist()
    return result


def _code(type_name: str) -> str:
    return next(code for name, code in VALUE_TYPES.values() if name == type_name and code)


def encode_value(key: str, value: Any, type_name: str | None = None) -> bytes:
    """A KV's type number and value as GGUF has them.

    `type_name` as in `GgufFile.kv_types` (`FLOAT32`, `ARRAY[INT32]`); without it bool, int, float
    and str become BOOL, UINT32 (INT32 or 64 bit where they do not fit), FLOAT32 and STRING, and a
    list an array of the type of its items, integers as INT32. Keys that llama.cpp reads as floats
    become FLOAT32 whatever the number. TypeError for anything else.
    """
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list | tuple):
        item = _item_type(type_name) or _guess_items(key, value)
        head = struct.pack("<IIQ", ARRAY, _NUMBERS[item], len(value))
        if item == "STRING":
            return head + b"".join(encode_string(v) for v in value)
        return head + struct.pack(f"<{len(value)}{_CODES[item]}", *value)
    kind = type_name or _guess(key, value)
    head = struct.pack("<I", _NUMBERS[kind])
    return head + (encode_string(value) if kind == "STRING" else struct.pack(f"<{_CODES[kind]}", value))


def _item_type(type_name: str | None) -> str | None:
    return type_name.removeprefix("ARRAY[").removesuffix("]") if type_name else None


def _guess(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "BOOL"
    if isinstance(value, str):
        return "STRING"
    if isinstance(value, float) or (isinstance(value, int) and _is_float_key(key)):
        return "FLOAT32"
    if isinstance(value, int):
        if value >= 0:
            return "UINT32" if value < 1 << 32 else "UINT64"
        return "INT32" if value >= -(1 << 31) else "INT64"
    raise TypeError(f"{key}: a GGUF value cannot be a {type(value).__name__}")


def _is_float_key(key: str) -> bool:
    return not key.startswith("tokenizer.") and key.endswith(_FLOAT_KEYS)


def _guess_items(key: str, values: Sequence[Any]) -> str:
    kinds = {_guess(key, v) for v in values} or {"INT32"}
    if kinds <= {"UINT32", "INT32"} and all(v < 1 << 31 for v in values):
        return "INT32"
    if len(kinds) == 1:
        return kinds.pop()
    if kinds <= {"UINT32", "INT32", "FLOAT32"}:
        return "FLOAT32"
    raise TypeError(f"{key}: the items of a GGUF array must be of one type, found {sorted(kinds)}")


def encode_string(text: str) -> bytes:
    raw = text.encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(raw)) + raw
