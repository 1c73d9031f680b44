"""Which metadata keys a llama.cpp reads, told from its library.

llama.cpp asks for a key by name and says nothing of keys, or of overrides, that it never asks for. The names that it
asks for stand in libllama as `%s.rope.freq_base` and `tokenizer.ggml.model`, so that each build's own are known,
however new. Any architecture's count: which of them a graph uses is not told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_HYPERPARAMETER = re.compile(rb"%s(\.[\w.]+)\0")
_ALWAYS = b"%s.block_count\0"  # no model loads without it: where it is missing, this is not where the names are


class KnownKeys:
    """The keys in one libllama."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.hyperparameters = sorted({found.decode() for found in _HYPERPARAMETER.findall(data)})  # `.rope.freq_base`

    def of(self, arch: str) -> Iterator[str]:
        """Every hyperparameter as a file of `arch` spells it."""
        return (arch + name for name in self.hyperparameters)

    def has(self, key: str, arch: str) -> bool:
        """Whether llama.cpp may ask for `key` when it loads a model of `arch`."""
        if key.startswith(f"{arch}.") and key.removeprefix(arch) in self.hyperparameters:
            return True
        # No tail of a longer name: `rope.freq_base` is not `%s.rope.freq_base`.
        spelled_out = rb"(?<![\w.%-])" + re.escape(key.encode()) + rb"\0"
        return "." in key and re.search(spelled_out, self._data) is not None


@lru_cache(maxsize=4)
def known_keys(library: str) -> KnownKeys | None:
    """The keys of the libllama at this path; None where they cannot be told from it."""
    try:
        data = Path(library).read_bytes()
    except OSError:
        return None
    return KnownKeys(data) if _ALWAYS in data else None
