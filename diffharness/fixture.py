"""Fixtures: fixed token ids, the positions that are scored, and where they came from.

The protocol is llama-perplexity's (tools/perplexity in llama.cpp), so that perplexities compare. The
ids, special tokens included, are cut into chunks, each evaluated from an empty KV cache with its first
token replaced by BOS where the vocabulary adds one. In a chunk of n tokens the positions n//2 … n−2
are scored; position i scores the prediction of token i+1. Unlike there, a shorter last chunk is kept
(dropped below 2 tokens), so that a short fixture is one chunk.

Rows: everything that is "per position" is indexed by the token's place in the fixture, chunk after
chunk, which is the row of captures and logits.

Making a fixture from text needs a tokenizer, which comes in as a function (`tokenizer.py`, or
llama.cpp through the engine); this module knows none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffharness.errors import FixtureError
from diffharness.settings import data_dir
from diffharness.token_difference import TokenDifference as TokenDifference
from diffharness.token_difference import first_difference as first_difference
from diffharness.weights.output import whole_file

IntArray = NDArray[np.int64]

SCHEMA = "diffharness.fixture/1"
DEFAULT_CHUNK = 512
MAX_FILE_BYTES = 64 << 20  # a text of millions of words; anything larger is a mistaken path
_MAX_ID = 2**31 - 1  # llama_token is an int32

TokenId = Annotated[int, Field(strict=True)]
Encode = Callable[[str], list[int]]  # text -> ids, with the special tokens that the vocabulary adds


class Fixture(BaseModel):
    """Token ids with their chunks and scored positions; construction checks everything it can alone.

    Raises FixtureError for contents that contradict each other, pydantic's ValidationError for
    wrong types; `load_fixture` turns the latter into a FixtureError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["diffharness.fixture/1"] = Field(default="diffharness.fixture/1", alias="schema")
    name: str
    ids: tuple[TokenId, ...]
    chunk: Annotated[int, Field(strict=True)] = DEFAULT_CHUNK
    scored: tuple[TokenId, ...] | None = None  # rows; None: the second half of each chunk
    text: str | None = None
    text_sha256: str | None = None
    whole_text: bool = True  # False: the ids are only the beginning of the text's
    tokenizer_kind: Literal["tokenizer.json", "gguf"] | None = None
    tokenizer_sha256: str | None = None
    adds_bos: bool = False
    bos_id: TokenId | None = None
    provenance: dict[str, str] = Field(default_factory=dict)  # how it was made, in words

    @model_validator(mode="after")
    def _check(self) -> Fixture:
        if len(self.ids) < 2:
            raise FixtureError(
                f"fixture {self.name!r} holds {_count(len(self.ids), 'token')}; at least 2 are needed",
                hint="a longer text, or more --tokens",
            )
        for position, token in enumerate(self.ids):
            if not 0 <= token <= _MAX_ID:
                raise FixtureError(f"fixture {self.name!r}: id {token} at position {position} is no token id")
        if self.chunk < 2:
            raise FixtureError(f"fixture {self.name!r}: chunks of {self.chunk} tokens; at least 2 are needed")
        if self.adds_bos and not 0 <= (-1 if self.bos_id is None else self.bos_id) <= _MAX_ID:
            raise FixtureError(f"fixture {self.name!r} adds BOS, but its bos_id is {self.bos_id}")
        if self.text is not None and self.text_sha256 != sha256_text(self.text):
            raise FixtureError(
                f"fixture {self.name!r}: its text has SHA-256 {sha256_text(self.text)}, text_sha256 says "
                f"{self.text_sha256}",
                hint="the text was edited after the ids were made; make the fixture anew",
            )
        self._check_scored()
        return self

    def _check_scored(self) -> None:
        if self.scored is None:
            if self.scored_positions().size == 0:
                raise FixtureError(
                    f"fixture {self.name!r}: no position is scored in {_count(self.n_tokens, 'token')} by chunks "
                    f"of {self.chunk}; 3 tokens in a chunk are needed",
                    hint="more --tokens or a larger chunk",
                )
            return
        if not self.scored:
            raise FixtureError(f"fixture {self.name!r}: the list of scored positions is empty")
        last_rows = {end - 1 for _, end in self.chunk_bounds()}
        previous = -1
        for position in self.scored:
            if not 0 <= position < self.n_tokens:
                raise FixtureError(
                    f"fixture {self.name!r}: scored position {position} lies outside of its {self.n_tokens} tokens"
                )
            if position in last_rows:
                raise FixtureError(
                    f"fixture {self.name!r}: scored position {position} is the last of its chunk, no token follows it"
                )
            if position <= previous:
                raise FixtureError(
                    f"fixture {self.name!r}: scored positions must increase, found {position} after {previous}"
                )
            previous = position

    # -- chunks and positions -------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """How many tokens are evaluated, which is the number of rows: a single token left over is dropped."""
        left_over = len(self.ids) % self.chunk
        return len(self.ids) - (left_over if left_over < 2 else 0)

    @property
    def ids_sha256(self) -> str:
        """SHA-256 of the ids as little-endian int32, BOS not replaced."""
        return hashlib.sha256(np.asarray(self.ids, dtype="<i4").tobytes()).hexdigest()

    def chunk_bounds(self) -> list[tuple[int, int]]:
        """[start, end) rows of each chunk."""
        return [(start, min(start + self.chunk, self.n_tokens)) for start in range(0, self.n_tokens, self.chunk)]

    def chunks(self) -> list[IntArray]:
        """The ids that both sides evaluate, BOS in the first place of each chunk where one is added."""
        return [self.input_ids()[start:end] for start, end in self.chunk_bounds()]

    def input_ids(self) -> IntArray:
        """All chunks joined: [n_tokens]."""
        ids = np.array(self.ids[: self.n_tokens], dtype=np.int64)
        if self.adds_bos and self.bos_id is not None:
            ids[:: self.chunk] = self.bos_id
        return ids

    def scored_positions(self) -> IntArray:
        """Rows whose prediction of the next token is scored, ascending."""
        if self.scored is not None:
            return np.array(self.scored, dtype=np.int64)
        halves = [np.arange(start + (end - start) // 2, end - 1) for start, end in self.chunk_bounds()]
        return np.concatenate(halves).astype(np.int64)

    def next_ids(self) -> IntArray:
        """The token that follows each scored position."""
        return np.array(self.ids, dtype=np.int64)[self.scored_positions() + 1]

    # -- variants -------------------------------------------------------------------------------------

    def first(self, n: int) -> Fixture:
        """The fixture's first n tokens; scored positions given by hand are kept as far as they reach."""
        if n > len(self.ids):
            raise FixtureError(
                f"{n} tokens were asked for, fixture {self.name!r} holds {len(self.ids)}",
                hint="fewer --tokens, or a fixture from a longer text",
            )
        if n == len(self.ids):
            return self
        rows = n - (1 if n % self.chunk == 1 else 0)
        scored = None if self.scored is None else [p for p in self.scored if p + 1 < rows]
        return self._with(ids=self.ids[: max(n, 0)], scored=scored, whole_text=False)

    def rechunked(self, chunk: int) -> Fixture:
        """The same ids in chunks of another size, for a model of short context."""
        return self._with(chunk=chunk)

    def _with(self, **changes: Any) -> Fixture:
        return Fixture.model_validate({**dict(self), **changes})

    # -- does it fit? ---------------------------------------------------------------------------------

    def check_vocab(self, n_vocab: int) -> None:
        """Raise FixtureError at the first id (or BOS) that a vocabulary of n_vocab tokens does not have."""
        ids = np.array(self.ids)
        outside = np.flatnonzero(ids >= n_vocab)
        if outside.size:
            raise FixtureError(
                f"fixture {self.name!r}: id {ids[outside[0]]} at position {outside[0]} lies outside of the model's "
                f"vocabulary of {n_vocab} tokens ({_count(outside.size, 'such id')})",
                hint="the fixture was made for another model; make one with `diffharness fixture new`",
            )
        if self.adds_bos and self.bos_id is not None and self.bos_id >= n_vocab:
            raise FixtureError(
                f"fixture {self.name!r}: BOS id {self.bos_id} lies outside of a vocabulary of {n_vocab} tokens"
            )

    def check_context(self, n_ctx: int) -> None:
        """Raise FixtureError if a chunk is longer than a context of n_ctx tokens."""
        longest = min(self.chunk, self.n_tokens)
        if longest > n_ctx:
            raise FixtureError(
                f"fixture {self.name!r} has chunks of {longest} tokens, the model's context holds {n_ctx}",
                hint=f"--tokens {n_ctx}, or `diffharness fixture new --chunk {n_ctx}`",
            )

    def check_tokenizer(self, kind: Literal["tokenizer.json", "gguf"], sha256: str, label: str) -> None:
        """Raise FixtureError if the ids came from another tokenizer of this kind; other kinds do not compare."""
        if self.tokenizer_sha256 is None or self.tokenizer_kind != kind or self.tokenizer_sha256 == sha256:
            return
        made_with = self.provenance.get("tokenizer", "another one")
        raise FixtureError(
            f"fixture {self.name!r} was made with the tokenizer {made_with} (SHA-256 {self.tokenizer_sha256[:16]}…), "
            f"{label} has SHA-256 {sha256[:16]}…",
            hint="`diffharness fixture verify` shows whether the ids differ; `fixture new` makes one that fits",
        )


# -- making, reading, writing -------------------------------------------------------------------------


def from_text(
    text: str,
    encode: Encode,
    *,
    name: str,
    chunk: int = DEFAULT_CHUNK,
    tokenizer_kind: Literal["tokenizer.json", "gguf"] | None = None,
    tokenizer_sha256: str | None = None,
    provenance: dict[str, str] | None = None,
) -> Fixture:
    """Tokenize a text whole. BOS is what `encode` puts before an empty text and before this one."""
    ids, empty = encode(text), encode("")
    adds_bos = bool(empty) and ids[:1] == empty[:1]
    return Fixture(
        name=name,
        ids=tuple(ids),
        chunk=chunk,
        text=text,
        text_sha256=sha256_text(text),
        tokenizer_kind=tokenizer_kind,
        tokenizer_sha256=tokenizer_sha256,
        adds_bos=adds_bos,
        bos_id=empty[0] if adds_bos else None,
        provenance=provenance or {},
    )


def from_ids(
    ids: Sequence[int], *, name: str = "ids", chunk: int = DEFAULT_CHUNK, bos_id: int | None = None
) -> Fixture:
    """Plain ids, for a model without a tokenizer; BOS is put into each chunk if `bos_id` is given."""
    return Fixture(name=name, ids=tuple(int(i) for i in ids), chunk=chunk, adds_bos=bos_id is not None, bos_id=bos_id)


def load_fixture(path: Path) -> Fixture:
    """Read a fixture file; FixtureError says what is wrong with it."""
    try:
        data = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise FixtureError(
            f"{path} is not JSON: {error}", hint="a fixture is made by `diffharness fixture new`"
        ) from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise FixtureError(f"{path} has the schema {found!r}, expected {SCHEMA!r}")
    try:
        return Fixture.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        faults = _count(error.error_count(), "fault")
        raise FixtureError(f"{path}: {where}: {first['msg']}, found {str(first['input'])[:40]!r} ({faults})") from None


def save_fixture(fixture: Fixture, path: Path) -> None:
    """Write beside, then rename: a fixture file is whole or absent. OutputError if that cannot be done."""
    data = fixture.model_dump(by_alias=True, exclude_none=True)
    with whole_file(path) as file:
        file.write((json.dumps(data, ensure_ascii=False, indent=None) + "\n").encode("utf-8"))


def read_text(path: Path) -> str:
    """A text file as it is: UTF-8, line ends untouched."""
    try:
        text = _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FixtureError(f"{path} is not UTF-8: byte {error.start}: {error.reason}") from None
    if not text:
        raise FixtureError(f"{path} is empty")
    return text


def text_path(name: str) -> Path:
    """The shipped text of that name, such as `english`."""
    path = fixtures_dir() / "texts" / f"{name}.txt"
    if not path.is_file():
        raise FixtureError(f"there is no text named {name!r}", hint=f"known: {', '.join(known_names())}")
    return path


def resolve(name_or_file: str) -> Path:
    """`--fixture NAME|FILE`: a file that exists, else a shipped fixture (.json) or text (.txt) of that name."""
    path = Path(name_or_file)
    if path.is_file():
        return path
    if "/" not in name_or_file and os.sep not in name_or_file:
        for candidate in (fixtures_dir() / f"{name_or_file}.json", fixtures_dir() / "texts" / f"{name_or_file}.txt"):
            if candidate.is_file():
                return candidate
    raise FixtureError(
        f"no fixture {name_or_file!r}: neither a file nor a shipped name", hint=f"known: {', '.join(known_names())}"
    )


def known_names() -> list[str]:
    """Names that `resolve` knows."""
    folder = fixtures_dir()
    return sorted({p.stem for p in [*folder.glob("*.json"), *folder.glob("texts/*.txt")]})


def fixtures_dir() -> Path:
    """The shipped fixtures and texts."""
    return data_dir("fixtures")


def sha256_text(text: str) -> str:
    """Of the text as UTF-8; text that UTF-8 cannot hold (a lone surrogate from JSON) is a FixtureError."""
    try:
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise FixtureError(f"the text is not Unicode: a lone surrogate at character {error.start}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise FixtureError(f"{path} has {size} bytes, a fixture or text has at most {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise FixtureError(f"cannot read {path}: {error.strerror}") from None


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
