"""Where results and progress go.

Results go to standard output, progress and messages to standard error. `-` as the file of `--json`
or `--markdown` stands for standard output, which then carries nothing else.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from diffharness.errors import BadInputError, OutputError
from diffharness.weights.output import whole_file

if TYPE_CHECKING:
    from rich.console import Console

    from diffharness.records import Record
    from diffharness.report.document import Document

STDOUT = Path("-")
WIDTH = 100  # columns of a result that goes to no terminal
LINE = 5000  # characters of a result on one line: a command that is to be copied is in it, whole

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
        result_console(*targets).print(clean(line, LINE), markup=False, soft_wrap=True)


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


def require_writable(*reports: Path | None) -> None:
    """Fail before the work rather than after it: OutputError if a report could not be written to one of these.

    Reports that are there are replaced, models never. BadInputError if more than one of them is standard output.
    """
    taken(*reports)
    for path in reports:
        if path is None or path == STDOUT:
            continue
        require_place(path)
        with _output_errors(path):
            if _is_model(path):
                raise FileExistsError(17, "a model is there, and this is the place of a report")


def require_place(path: Path) -> None:
    """OutputError if no file could be made at `path`, or none in place of the one that is there."""
    with _output_errors(path):
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if _is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            return
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass


def _is_model(path: Path) -> bool:
    if not path.is_file() or not os.access(path, os.R_OK):
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF" or path.suffix == ".safetensors"


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
