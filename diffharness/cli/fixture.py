"""`diffharness fixture new|verify|show`: make and check fixtures."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from diffharness import __version__
from diffharness.cli import _tokenizers
from diffharness.cli._options import JsonOption
from diffharness.cli._output import STDOUT, emit, require_writable, result_console, taken
from diffharness.cli._tokenizers import Source
from diffharness.errors import BadInputError, InconclusiveError
from diffharness.fixture import (
    DEFAULT_CHUNK,
    Fixture,
    TokenDifference,
    first_difference,
    from_text,
    load_fixture,
    read_text,
    resolve,
    save_fixture,
)

app = typer.Typer(name="fixture", no_args_is_help=True, help="Make and check fixtures: fixed token ids.")

CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", metavar="DIR", help="A checkpoint folder, for its tokenizer.json.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="GGUF", help="A GGUF, for its vocabulary in llama.cpp.")
]


@app.command("new")
def new(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A UTF-8 text file, or a shipped text's name.")],
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    chunk: Annotated[
        int, typer.Option("--chunk", metavar="N", min=2, help="Tokens evaluated together, from an empty cache.")
    ] = DEFAULT_CHUNK,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where the fixture goes.", show_default="standard output"),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Make a fixture from a text, with the tokenizer of a checkpoint or of a GGUF."""
    target = out or STDOUT
    on_stdout = taken(target, json_file)
    require_writable(out, json_file)
    path = resolve(text)
    if path.suffix == ".json":
        raise BadInputError(f"expected a text, found the fixture {path}", hint="`fixture show` shows a fixture")
    if out is not None and out.exists() and out.samefile(path):
        raise BadInputError(f"{out} is the text itself", hint="give the fixture another name")
    content = read_text(path)
    sources = _tokenizers.sources(checkpoint, model)
    if len(sources) != 1:
        raise BadInputError(
            f"expected one of --checkpoint and --model, found {'both' if sources else 'neither'}",
            hint="`fixture verify` compares the two" if sources else "give --checkpoint DIR or --model GGUF",
        )
    made = _make(sources[0], content, path, chunk)
    if target == STDOUT:
        emit(STDOUT, made.model_dump_json(by_alias=True, exclude_none=True))
    else:
        save_fixture(made, target)
    emit(json_file, json.dumps(summary(made), indent=2, ensure_ascii=False))
    if not on_stdout:
        _print_summary(made, target)


@app.command("verify")
def verify(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A fixture file, or a shipped fixture's name.")],
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    json_file: JsonOption = None,
) -> None:
    """Tokenize a fixture's text again and print the first difference.

    Exit code 0: every tokenizer given makes the same ids; 1: one does not (verdict `tokens`);
    2: unreadable; 125: the fixture holds no text, so that there is nothing to compare.
    """
    require_writable(json_file)
    fixture = load_fixture(resolve(file))
    sources = _tokenizers.sources(checkpoint, model)
    if not sources:
        raise BadInputError("expected --checkpoint, --model or both, found neither")
    for source in sources:
        if source.n_vocab is not None:
            fixture.check_vocab(source.n_vocab)
    if fixture.text is None:
        raise InconclusiveError(
            f"fixture {fixture.name!r} holds ids and no text; there is nothing to tokenize again",
            hint="its ids are inside the vocabulary" if any(s.n_vocab for s in sources) else None,
        )
    checks = [(source, _difference(fixture, fixture.text, source)) for source in sources]
    verdict = "tokens" if any(difference for _, difference in checks) else "agree"
    record = {
        "schema": "diffharness.fixture-check/1",
        "verdict": verdict,
        "fixture": summary(fixture),
        "checks": [
            {
                "kind": source.kind,
                "tokenizer": source.label,
                "sha256": source.sha256,
                "same": difference is None,
                "first_difference": difference and asdict(difference),
            }
            for source, difference in checks
        ],
    }
    emit(json_file, json.dumps(record, indent=2, ensure_ascii=False))
    console = result_console(json_file)
    for source, difference in checks:
        for line in _check_lines(fixture, source, difference):
            console.print(line, markup=False, soft_wrap=True)
    console.print(f"verdict: {verdict}", markup=False)
    if verdict != "agree":
        raise typer.Exit(1)


@app.command("show")
def show(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A fixture file, or a shipped fixture's name.")],
    json_file: JsonOption = None,
) -> None:
    """Show what a fixture holds: ids, chunks, scored positions, text, provenance."""
    path = resolve(file)
    fixture = load_fixture(path)
    emit(json_file, json.dumps(summary(fixture), indent=2, ensure_ascii=False))
    if not taken(json_file):
        _print_summary(fixture, path)


def summary(fixture: Fixture) -> dict[str, Any]:
    """What `show` prints, in JSON's own types."""
    lengths = [end - start for start, end in fixture.chunk_bounds()]
    return {
        "name": fixture.name,
        "ids": len(fixture.ids),
        "ids_sha256": fixture.ids_sha256,
        "chunk": fixture.chunk,
        "chunk_lengths": lengths,
        "evaluated": fixture.n_tokens,
        "scored": len(fixture.scored_positions()),
        "scored_by": "second half of each chunk" if fixture.scored is None else "the fixture's own list",
        "bos_id": fixture.bos_id if fixture.adds_bos else None,
        "text_head": None if fixture.text is None else _head(fixture.text),
        "text_characters": None if fixture.text is None else len(fixture.text),
        "text_sha256": fixture.text_sha256,
        "whole_text": fixture.whole_text,
        "tokenizer_kind": fixture.tokenizer_kind,
        "tokenizer_sha256": fixture.tokenizer_sha256,
        "provenance": fixture.provenance,
    }


# -- made and compared ---------------------------------------------------------------------------------


def _make(source: Source, text: str, path: Path, chunk: int) -> Fixture:
    both = dict(zip([text, ""], source.encode_all([text, ""]), strict=True))
    return from_text(
        text,
        both.__getitem__,
        name=path.stem,
        chunk=chunk,
        tokenizer_kind=source.kind,
        tokenizer_sha256=source.sha256,
        provenance={"text": path.name, "tokenizer": source.label, "made by": f"diffharness {__version__}"},
    )


def _difference(fixture: Fixture, text: str, source: Source) -> TokenDifference | None:
    """Of the fixture's ids (a) to the tokenizer's (b), as far as the fixture reaches."""
    [ids] = source.encode_all([text])
    if not fixture.whole_text:
        ids = ids[: len(fixture.ids)]
    return first_difference(fixture.ids, ids, source.piece)


# -- for people -----------------------------------------------------------------------------------------


def _check_lines(fixture: Fixture, source: Source, difference: TokenDifference | None) -> list[str]:
    if difference is None:
        lines = [f"{source.label}: the same {len(fixture.ids)} ids"]
        if fixture.tokenizer_kind == source.kind and fixture.tokenizer_sha256 != source.sha256:
            lines.append("  (the fixture was made with another file; on this text the two agree)")
        return lines
    d = difference
    return [
        f"{source.label}: differs at position {d.position} of {d.n_a} (fixture) and {d.n_b} (tokenizer)",
        f"  after      {_pieces(d.before)}",
        f"  fixture    {_token(d.id_a)} {_pieces(d.after_a)}",
        f"  tokenizer  {_token(d.id_b)} {_pieces(d.after_b)}",
    ]


def _pieces(pieces: tuple[str, ...]) -> str:
    return " ".join(repr(piece) for piece in pieces) or "—"


def _token(token: int | None) -> str:
    return "end" if token is None else str(token)


def _print_summary(fixture: Fixture, path: Path) -> None:
    about = summary(fixture)
    lengths = about["chunk_lengths"]
    short = f", the last of {lengths[-1]}" if lengths[-1] != fixture.chunk else ""
    lines = {
        "fixture": f"{fixture.name} ({path})",
        "ids": f"{about['ids']}, SHA-256 {about['ids_sha256']}",
        "chunks": f"{len(lengths)} of {fixture.chunk} tokens{short}, {about['evaluated']} tokens evaluated",
        "scored": f"{about['scored']} positions, {about['scored_by']}",
        "BOS": "none added" if about["bos_id"] is None else f"id {about['bos_id']} in the first place of each chunk",
        "tokenizer": f"{about['tokenizer_kind']}, SHA-256 {about['tokenizer_sha256']}"
        if about["tokenizer_sha256"]
        else "not known",
        "text": f"{about['text_characters']} characters, SHA-256 {about['text_sha256']}"
        if fixture.text is not None
        else "none",
        "begins": about["text_head"],
        **{f"· {key}": value for key, value in fixture.provenance.items()},
    }
    for key, value in lines.items():
        if value is not None:
            sys.stdout.write(f"{key:<12}{value}\n")


def _head(text: str, length: int = 80) -> str:
    joined = " ".join(text[: 4 * length].split())
    return joined if len(joined) <= length else joined[: length - 1] + "…"
