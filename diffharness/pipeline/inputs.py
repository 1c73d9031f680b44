"""From paths to what a run works on: artifact, checkpoint and fixture, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffharness import fixture as fixtures
from diffharness.engine.runner import Engine, EngineCrash
from diffharness.errors import CheckpointError, FixtureError, UnsupportedError
from diffharness.fixture import Fixture
from diffharness.legs import tokens as tokens_leg
from diffharness.legs.tokens import TokensOutcome
from diffharness.pipeline.crashes import crash_finding
from diffharness.reference import archs, memory
from diffharness.settings import EngineSettings
from diffharness.tokenizer import CheckpointTokenizer, gguf_tokenizer_sha256
from diffharness.weights.check import check_model
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.names import MAPS
from diffharness.weights.source import EMBEDDING
from diffharness.words import counted

DEFAULT_TEXT = "english"
DEFAULT_TOKENS = 512


@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads."""

    artifact: GgufFile
    checkpoint: Checkpoint | None
    fixture: Fixture
    tokens: TokensOutcome
    gap: str | None = None  # why the reference cannot compute the artifact, where it cannot

    @property
    def n_ctx_train(self) -> int | None:
        value = self.artifact.metadata.get(f"{self.artifact.arch}.context_length")
        return int(value) if isinstance(value, int) else None

    def stamps(self) -> list[tuple[str, int, int]]:
        """Path, size and time of every file that the legs read one after another."""
        paths = [*self.artifact.paths, *(self.checkpoint.paths if self.checkpoint else [])]
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def open_artifact(path: Path) -> GgufFile:
    """The GGUF, with every tensor that its architecture calls for and no other, and no key that the reference lacks."""
    artifact = _checked(path)
    archs.build(artifact.metadata)  # says what the reference does not know before anything runs
    return artifact


def open_any_artifact(path: Path) -> tuple[GgufFile, str | None]:
    """The GGUF, and why the reference cannot compute it, if so: its architecture, or a key that makes a variant."""
    artifact = open_gguf(path)
    if artifact.arch not in MAPS:
        return artifact, f"it does not know {artifact.arch!r} models"
    artifact.close()
    artifact = _checked(path)
    try:
        archs.build(artifact.metadata)
    except UnsupportedError as error:
        return artifact, error.message
    return artifact, None


def _checked(path: Path) -> GgufFile:
    artifact = open_gguf(path, threads=torch.get_num_threads())
    extra = check_model(artifact)
    if extra:
        raise UnsupportedError(
            f"{artifact.label} holds {counted(len(extra), 'tensor')} that a {artifact.arch} model does not have: "
            + ", ".join(extra[:5]),
            hint="the reference would leave them out, and so compute another model than the file says",
            tensor=extra[0],
        )
    return artifact


def open_checkpoint(folder: Path, artifact: GgufFile) -> Checkpoint:
    """The checkpoint; CheckpointError if it is of another architecture or other sizes than the artifact."""
    checkpoint = Checkpoint(folder, threads=artifact.threads)
    if checkpoint.tensors[EMBEDDING].shape[0] > artifact.tensors[EMBEDDING].shape[0]:
        # Converters drop padding behind the vocabulary's last token.
        n_vocab = artifact.tensors[EMBEDDING].shape[0]
        checkpoint = Checkpoint(folder, n_vocab=n_vocab, threads=artifact.threads)
    if checkpoint.arch != artifact.arch:
        raise CheckpointError(
            f"{checkpoint.label} is a {checkpoint.arch} model, the artifact {artifact.label} says {artifact.arch}",
            hint="give the checkpoint that the artifact was made from",
        )
    differing = [
        f"{name}: checkpoint {info.shape}, artifact {artifact.tensors[name].shape}"
        for name, info in checkpoint.tensors.items()
        if name in artifact.tensors and artifact.tensors[name].shape != info.shape
    ]
    if differing:
        raise CheckpointError(
            f"{counted(len(differing), 'tensor')} of {checkpoint.label} differ in shape from {artifact.label}: "
            + "; ".join(differing[:5]),
            hint="give the checkpoint that the artifact was made from",
        )
    return checkpoint


def choose_fixture(
    artifact: GgufFile,
    checkpoint: Checkpoint | None,
    name: str | None,
    n_tokens: int | None,
    engine: EngineSettings,
    *,
    default_tokens: int = DEFAULT_TOKENS,
) -> tuple[Fixture, TokensOutcome]:
    """The fixture's first `n_tokens` (by default `default_tokens`, or all there are), and what the tokens leg says.

    A text is tokenized by the artifact's own vocabulary in llama.cpp, or by the checkpoint's tokenizer if
    that cannot be done. A model with neither needs a fixture of ids. Raises EngineCrash where llama.cpp
    dies over a text that nothing else can tokenize.
    """
    path = fixtures.resolve(name or DEFAULT_TEXT)
    loaded = fixtures.load_fixture(path) if path.suffix == ".json" else None
    text = fixtures.read_text(path) if loaded is None else loaded.text if loaded.whole_text else None
    tokenizer = None
    if checkpoint is not None and checkpoint.tokenizer_path is not None:
        tokenizer = CheckpointTokenizer(checkpoint.tokenizer_path)
    encoded, crash = _engine_ids(artifact, text, engine)
    found = loaded or _from_text(path, text or "", artifact, tokenizer, encoded, crash)
    outcome = _compare_tokenizers(artifact, tokenizer, text, encoded, crash)
    _check_ids(found, artifact, tokenizer, text, encoded)
    found = found.first(n_tokens if n_tokens is not None else min(len(found.ids), max(default_tokens, found.chunk)))
    found.check_vocab(artifact.vocab_size)
    return found, outcome


def open_inputs(
    model: Path,
    checkpoint: Path | None,
    fixture: str | None,
    n_tokens: int | None,
    engine: EngineSettings,
    *,
    need_reference: bool = True,
) -> Inputs:
    """All of a run's inputs; each kind of unfit input is an error of its own.

    An artifact that the reference does not know is one too, unless that is not needed: then `gap` says what it is.
    """
    artifact, gap = (open_artifact(model), None) if need_reference else open_any_artifact(model)
    source = None
    if checkpoint is not None and (gap is None or artifact.arch in MAPS):
        source = open_checkpoint(checkpoint, artifact)
    chosen, outcome = choose_fixture(artifact, source, fixture, n_tokens, engine)
    if gap is None:
        memory.require(artifact, chosen.chunks())
    inputs = Inputs(artifact, source, chosen, outcome, gap)
    if inputs.n_ctx_train is not None:
        chosen.check_context(inputs.n_ctx_train)
    return inputs


Encoded = dict[str, list[int]]  # a text's ids, and the empty text's


def _engine_ids(
    artifact: GgufFile, text: str | None, engine: EngineSettings
) -> tuple[Encoded | None, EngineCrash | None]:
    """Ids by the artifact's own vocabulary; None if there is no text or no vocabulary, or llama.cpp dies over it."""
    if text is None or "tokenizer.ggml.tokens" not in artifact.metadata:
        return None, None
    texts = [text, ""]
    try:
        ids = Engine(engine).tokenize(artifact.paths[0], texts, parse_special=False)
    except EngineCrash as crash:
        return None, crash
    return dict(zip(texts, ids, strict=True)), None


def _from_text(
    path: Path,
    text: str,
    artifact: GgufFile,
    tokenizer: CheckpointTokenizer | None,
    encoded: Encoded | None,
    crash: EngineCrash | None,
) -> Fixture:
    if encoded is not None:
        return fixtures.from_text(
            text,
            encoded.__getitem__,
            name=path.stem,
            tokenizer_kind="gguf",
            tokenizer_sha256=gguf_tokenizer_sha256(artifact.metadata),
            provenance={"text": path.name, "tokenizer": artifact.label},
        )
    if tokenizer is not None:
        return fixtures.from_text(
            text,
            tokenizer.encode,
            name=path.stem,
            tokenizer_kind="tokenizer.json",
            tokenizer_sha256=tokenizer.sha256,
            provenance={"text": path.name, "tokenizer": tokenizer.label},
        )
    if crash is not None:
        raise crash
    raise FixtureError(
        f"{artifact.label} has no tokenizer to make tokens of the text {path.name} with",
        hint="give a fixture of ids (--fixture FILE.json), or a checkpoint with tokenizer.json",
    )


def _check_ids(
    fixture: Fixture,
    artifact: GgufFile,
    tokenizer: CheckpointTokenizer | None,
    text: str | None,
    encoded: Encoded | None,
) -> None:
    """Raise FixtureError if the fixture's ids are another tokenizer's."""
    sha256 = gguf_tokenizer_sha256(artifact.metadata)
    if sha256 is not None:
        fixture.check_tokenizer("gguf", sha256, artifact.label)
    if tokenizer is not None:
        fixture.check_tokenizer("tokenizer.json", tokenizer.sha256, tokenizer.label)
    elif fixture.tokenizer_kind == "tokenizer.json" and text is not None and encoded is not None:
        # No checkpoint to hold the fixture's hash against: the artifact's own ids must then be the same.
        pieces = artifact.metadata["tokenizer.ggml.tokens"]
        found = fixtures.first_difference(fixture.ids, encoded[text], lambda token: _piece(pieces, token))
        if found is not None:
            raise FixtureError(
                f"fixture {fixture.name!r} was made with another tokenizer than {artifact.label} has: at position "
                f"{found.position} it holds {found.id_a}, the artifact's vocabulary gives {found.id_b}",
                hint="make one that fits with `diffharness fixture new`, or give the checkpoint it was made with",
            )


def _compare_tokenizers(
    artifact: GgufFile,
    tokenizer: CheckpointTokenizer | None,
    text: str | None,
    encoded: Encoded | None,
    crash: EngineCrash | None,
) -> TokensOutcome:
    if text is None:
        return tokens_leg.not_run("the fixture holds ids without their text")
    if crash is not None:
        outcome = tokens_leg.not_run(f"the engine does not tokenize: {crash.message}")
        outcome.findings.append(crash_finding("tokenizing", crash))
        return outcome
    if tokenizer is None:
        return tokens_leg.not_run("there is no checkpoint with a tokenizer.json to compare with")
    if encoded is None:
        return tokens_leg.not_run("the artifact has no vocabulary")
    pieces = artifact.metadata["tokenizer.ggml.tokens"]
    return tokens_leg.compare(
        tokenizer.encode(text),
        encoded[text],
        checkpoint_piece=tokenizer.piece,
        artifact_piece=lambda token: _piece(pieces, token),
    )


def _piece(pieces: Sequence[str], token: int) -> str:
    return str(pieces[token]) if 0 <= token < len(pieces) else f"<id {token}>"
