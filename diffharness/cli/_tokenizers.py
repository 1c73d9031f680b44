"""The tokenizers that `diffharness fixture` can ask: a checkpoint's `tokenizer.json`, and a GGUF's vocabulary in
llama.cpp itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffharness.cli._models import model_path
from diffharness.cli._output import progress_console
from diffharness.errors import FixtureError


@dataclass(frozen=True)
class Source:
    """One tokenizer: `encode_all` gives the ids of several texts at once, `piece` spells an id."""

    kind: Literal["tokenizer.json", "gguf"]
    label: str
    sha256: str
    encode_all: Callable[[list[str]], list[list[int]]]
    piece: Callable[[int], str]
    n_vocab: int | None  # of the model, where it is known


def sources(checkpoint: Path | None, model: str | None) -> list[Source]:
    """The tokenizers that were named. Raises FixtureError for a GGUF without one."""
    found = []
    if checkpoint is not None:
        found.append(_checkpoint_source(checkpoint))
    if model is not None:
        found.append(_gguf_source(model_path(model)))
    return found


def _checkpoint_source(folder: Path) -> Source:
    from diffharness.tokenizer import CheckpointTokenizer

    tokenizer = CheckpointTokenizer(folder)
    return Source(
        kind="tokenizer.json",
        label=tokenizer.label,
        sha256=tokenizer.sha256,
        encode_all=lambda texts: [tokenizer.encode(text) for text in texts],
        piece=tokenizer.piece,
        n_vocab=None,
    )


def _gguf_source(path: Path) -> Source:
    from diffharness.tokenizer import gguf_tokenizer_sha256
    from diffharness.weights.gguf_file import open_gguf

    with open_gguf(path) as artifact:
        sha256 = gguf_tokenizer_sha256(artifact.metadata)
        if sha256 is None:
            raise FixtureError(f"{path.name} has no tokenizer", hint="give a checkpoint's with --checkpoint")
        pieces: list[str] = list(artifact.metadata["tokenizer.ggml.tokens"])
        n_vocab = artifact.vocab_size
    return Source(
        kind="gguf",
        label=path.name,
        sha256=sha256,
        encode_all=lambda texts: engine_ids(path, texts),
        piece=lambda token: pieces[token] if 0 <= token < len(pieces) else f"<id {token}>",
        n_vocab=n_vocab,
    )


def engine_ids(path: Path, texts: list[str]) -> list[list[int]]:
    """Ids of the texts by the GGUF's vocabulary in llama.cpp; special tokens that stand in a text are text."""
    from diffharness.engine.runner import Engine
    from diffharness.settings import EngineSettings

    progress_console().print(f"tokenizing with llama.cpp and the vocabulary of {path.name}", markup=False)
    return Engine(EngineSettings()).tokenize(path, texts, parse_special=False)
