"""What the commands share: options declared once, and where results and progress go.

Results go to standard output, progress and messages to standard error. `-` as the file of `--json`
or `--markdown` stands for standard output, which then carries nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffharness.errors import BadInputError, OutputError
from diffharness.weights.output import whole_file

if TYPE_CHECKING:
    from rich.console import Console

    from diffharness.records import Record
    from diffharness.report.document import Document

log = logging.getLogger("diffharness")
STDOUT = Path("-")
ARGUMENTS = "diffharness.arguments"  # where a context keeps the words that followed the program's name
WIDTH = 100  # columns of a result that goes to no terminal

# ---- options


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

# ---- consoles


def progress_console(quiet: bool = False) -> Console:
    """Standard error, for progress and messages."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)


def result_console(*targets: Path | None) -> Console:
    """Standard output for the human's result; silent where a file option has taken standard output."""
    from rich.console import Console

    class Result(Console):
        def on_broken_pipe(self) -> None:
            """Let the reader that left be seen where every error is, rather than exit with 1 from here."""
            raise BrokenPipeError

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
    return Result(quiet=taken(*targets), highlight=False, width=width)


@contextmanager
def printing() -> Iterator[None]:
    """Around what goes to standard output: OutputError if that is full; a reader that left stays BrokenPipeError."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left cannot be written either
        raise OutputError(
            f"cannot write to standard output: {error.strerror or error}", hint="give a place that has room"
        ) from error


def present(
    document: Document, record: Record, json_file: Path | None, markdown: Path | None, *, line: str | None = None
) -> None:
    """The record and the report to where they were asked for, and the report, or only `line`, to the human."""
    from diffharness.report.document import print_document, to_markdown

    emit(json_file, record.to_json() if json_file else "")
    emit(markdown, to_markdown(document) if markdown else "")
    if line is not None:
        print_line(line, json_file, markdown)
        return
    with printing():
        print_document(document, result_console(json_file, markdown))


def keep(out: Path | None, name: str, document: Document, record: Record) -> None:
    """The record and the report as NAME.json and NAME.md in the folder `out`; nothing for None."""
    from diffharness.report.document import to_markdown

    if out is not None:
        write_text(out / f"{name}.json", record.to_json())
        write_text(out / f"{name}.md", to_markdown(document))


def print_line(line: str, *targets: Path | None) -> None:
    """A result as one line, as scripts want it; what it quotes from a file is made harmless."""
    from diffharness.report._format import clean

    with printing():
        result_console(*targets).print(clean(line), markup=False, soft_wrap=True)


def taken(*targets: Path | None) -> bool:
    """Whether one of the file options is `-`; BadInputError if more than one is."""
    dashes = [target for target in targets if target == STDOUT]
    if len(dashes) > 1:
        raise BadInputError(
            "expected at most one of --json and --markdown to be -, found both",
            hint="standard output carries one of them: give the other a file",
        )
    return bool(dashes)


# ---- files


def emit(target: Path | None, text: str) -> None:
    """Write a result to a file, or to standard output for `-`; nothing for None."""
    if target is None:
        return
    if target == STDOUT:
        with printing():
            sys.stdout.write(text if text.endswith("\n") else text + "\n")
    else:
        write_text(target, text if text.endswith("\n") else text + "\n")


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}",
            hint="give a place that exists, may be written to, and has room",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: beside its place first, then renamed. OutputError if it cannot be.

    A device or pipe (/dev/stdout) is written to and stays what it is, and so does a link to a file.
    """
    data = text.encode("utf-8")
    with _output_errors(path):
        if _is_special(path):
            path.write_bytes(data)
            return
    with whole_file(path.resolve()) as file:
        file.write(data)


def _is_special(path: Path) -> bool:
    """Whether something is there that is neither file nor folder: renaming a file over it would destroy it."""
    return path.exists() and not path.is_file() and not path.is_dir()


def require_writable(*targets: Path | None) -> None:
    """Fail before the work rather than after it: OutputError if a file could not be made at one of `targets`.

    BadInputError if more than one of them is standard output.
    """
    taken(*targets)
    for path in targets:
        if path is None or path == STDOUT:
            continue
        with _output_errors(path):
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
            if _is_special(path):
                if not os.access(path, os.W_OK):
                    raise PermissionError(13, "Permission denied")
                continue
            with tempfile.TemporaryFile(dir=path.resolve().parent):
                pass


def make_folder(path: Path) -> Path:
    """The folder, made if need be, with a check that files can be made in it. OutputError if not."""
    with _output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


@contextmanager
def folder_of_run(out: Path | None) -> Iterator[None]:
    """The run folder, there and open to writing; one that was made for a run that wrote nothing goes again."""
    if out is None:
        yield
        return
    is_new = not out.exists()
    make_folder(out)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # it is not empty
                out.rmdir()
        raise


# ---- models


def model_path(model: str) -> Path:
    """The file behind MODEL: a path as it is, `hf://owner/repo[@revision]/file.gguf` through huggingface_hub.

    Of a split file (`-00001-of-0000N`) all parts are fetched. BadInputError if it cannot be had.
    """
    if not model.startswith("hf://"):
        return Path(model)
    parts = model.removeprefix("hf://").split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise BadInputError(
            f"expected hf://owner/repo/file.gguf, found {model}", hint="name the file in the repository, or give a path"
        )
    owner, name, file = parts
    name, _, revision = name.partition("@")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        paths = [hf_hub_download(f"{owner}/{name}", part, revision=revision or None) for part in split_parts(file)]
    except LocalEntryNotFoundError as error:  # before its base class: no network, or offline mode
        raise BadInputError(
            f"{model} is not in the local cache, and {_no_hub()}",
            hint="download the file and give its path; HF_HOME and HF_HUB_CACHE say where the cache is",
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BadInputError(
            f"cannot get {model}: {str(error).strip().splitlines()[0]}",
            hint="check owner, repo and file; for a private one, log in with `hf auth login`",
        ) from error
    return Path(paths[0])


def _no_hub() -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return "HF_HUB_OFFLINE forbids to fetch it" if HF_HUB_OFFLINE else "the hub cannot be reached"


def split_parts(file: str) -> list[str]:
    """Every part's name of a split GGUF, first part first; `[file]` where it is not split."""
    stem, dash, count = file.removesuffix(".gguf").rpartition("-of-")
    if not dash or not count.isdigit() or not stem[-5:].isdigit():
        return [file]
    return [f"{stem[:-5]}{i:05d}-of-{count}.gguf" for i in range(1, int(count) + 1)]
