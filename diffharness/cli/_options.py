"""The options that commands share, each declared once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

log = logging.getLogger("diffharness")


def _set_level(level: int) -> None:
    log.setLevel(level)


def _on_quiet(quiet: bool) -> bool:
    if quiet:
        _set_level(logging.ERROR)
    return quiet


def _on_verbose(count: int) -> int:
    if count:
        _set_level(logging.DEBUG if count > 1 else logging.INFO)
    return count


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A GGUF: a path, or hf://owner/repo/file.gguf.", show_default="the embedded model"
    ),
]
RequiredModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF: a path, or hf://owner/repo/file.gguf.")
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="DIR", help="The Hugging Face folder that MODEL claims to come from."),
]
RequiredCheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", metavar="DIR", help="The Hugging Face folder that MODEL claims to come from.")
]
FixtureOption = Annotated[
    str | None,
    typer.Option("--fixture", metavar="NAME|FILE", help="The tokens: a shipped text's name, or a fixture file."),
]
TokensOption = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", min=2, help="Take the fixture's first N tokens; score their second half."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Tolerances, instead of the shipped ones."),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME|PATH",
        help="The engine: settings by name or YAML file, a folder of another build's libraries, or another Python.",
    ),
]
EnginesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME|PATH",
        help="The engine: settings by name or YAML file, a folder of another build's libraries, or another Python. "
        "Repeatable: all legs run on the first, and the others are compared with it.",
    ),
]
OverrideKvOption = Annotated[
    list[str] | None,
    typer.Option(
        "--override-kv",
        metavar="KEY=TYPE:VALUE",
        help="Replace a metadata key for the engine only, in llama.cpp's own syntax. Repeatable.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Where the reference runs: cpu, cuda, cuda:1, mps.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="Threads of engine and reference.", show_default="all cores"),
]
DtypeOption = Annotated[Literal["float32", "float64"], typer.Option("--dtype", help="What the reference computes in.")]
StrictOption = Annotated[
    Literal["auto", "whole", "slices"],
    typer.Option("--strict", help="The strict engine's F32 model: one file, or slices of layers where that is large."),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Keep the run folder here: record, captures, reports."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the record as JSON; - for standard output.")
]
MarkdownOption = Annotated[
    Path | None,
    typer.Option("--markdown", metavar="FILE", help="Write the report as Markdown; - for standard output."),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=_on_quiet,
        help="No progress, only the result; of `run`, `compare` and `bisect` one line.",
    ),
]
VerboseOption = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, callback=_on_verbose, show_default=False,
        help="Say more: seconds by step; twice for llama.cpp's own log and tracebacks.",
    ),
]  # fmt: skip
