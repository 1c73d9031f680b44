"""A checkpoint's tokenizer (`tokenizer.json`, read with `tokenizers`), and the identity of a GGUF's.

Ids are made as llama-perplexity makes them: special tokens that the vocabulary adds are added, special
tokens that stand in the text are text. Neither truncation nor padding that the file may ask for
applies. `tokenizer_config.json` is not consulted: what `tokenizer.json` adds is what is added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from diffharness.errors import CheckpointError

MAX_FILE_BYTES = 256 << 20  # the largest in use have about 40 MB


class CheckpointTokenizer:
    """`tokenizer.json` of a checkpoint folder (or that file itself); CheckpointError if it is unreadable."""

    kind = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        self.path = path / "tokenizer.json" if path.is_dir() else path
        try:
            size = self.path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise CheckpointError(f"{self.path} has {size} bytes, a tokenizer has at most {MAX_FILE_BYTES}")
            data = self.path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"cannot read the tokenizer {self.path}: {error.strerror}",
                hint="a checkpoint folder with tokenizer.json is needed",
            ) from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:
            if type(error) not in (Exception, ValueError):  # the binding raises these two for a malformed file
                raise
            raise CheckpointError(f"{self.path} is not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    @property
    def label(self) -> str:
        """Folder and file name, for messages and provenance."""
        return f"{self.path.resolve().parent.name}/{self.path.name}"

    @property
    def n_vocab(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text, with the special tokens that the tokenizer adds (BOS)."""
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def piece(self, token: int) -> str:
        """The token as the vocabulary spells it; `<id N>` for an id that it does not have."""
        piece = self._tokenizer.id_to_token(token)
        return f"<id {token}>" if piece is None else piece


def gguf_tokenizer_sha256(metadata: Mapping[str, Any]) -> str | None:
    """Identity of a GGUF's vocabulary: SHA-256 over its `tokenizer.ggml.*` keys; None if it has no tokens."""
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    digest = hashlib.sha256()
    for key in sorted(k for k in metadata if k.startswith("tokenizer.ggml.")):
        value = metadata[key]
        plain = value.tolist() if hasattr(value, "tolist") else value
        digest.update(json.dumps([key, plain], ensure_ascii=True, default=repr).encode())
    return digest.hexdigest()
