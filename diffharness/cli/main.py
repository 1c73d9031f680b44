"""The command line: commands by name, and one place where every error becomes a message and an exit code.

Exit codes: 0 agree or done, 1 a verdict against engine, artifact or tokens, 2 bad usage or unreadable
input, 125 inconclusive, 70 internal error, 130 interrupted, 141 standard output was closed early,
143 terminated.

Modules of commands import what is heavy (torch, the engine) inside the command, so that `--help` and
`--version` answer at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import traceback
from contextlib import suppress
from inspect import cleandoc
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffharness import __version__
from diffharness.cli import (
    archs,
    bisect,
    compare,
    damage,
    doctor,
    explain,
    fixture,
    gate,
    grade,
    inspect,
    matrix,
    recipe,
    replay,
    report,
    restore,
    run,
    synth,
)
from diffharness.cli._options import log
from diffharness.cli._request import ARGUMENTS
from diffharness.errors import BadInputError, DiffharnessError
from diffharness.report._format import clean

INTERNAL_ERROR = 70
INTERRUPTED = 130
BROKEN_PIPE = 141
LONGEST_MESSAGE = 2000  # characters


def _say(*lines: str | None) -> None:
    """Messages on standard error; what they quote from a file is made harmless."""
    for line in lines:
        if line:
            with suppress(OSError):  # standard error may be closed or full; the exit code still tells
                print(clean(line, LONGEST_MESSAGE), file=sys.stderr)


def _traceback_if_asked() -> None:
    if log.isEnabledFor(logging.DEBUG):
        traceback.print_exc()


class Commands(TyperGroup):
    """The top-level group: errors raised on purpose end a command with their own exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].endswith(".gguf") and args[0] not in self.commands:
            raise BadInputError(f"expected a command, found {args[0]}", hint=f"diffharness run {shlex.join(args)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except DiffharnessError as error:
            _traceback_if_asked()
            _say(f"error: {error.message}", error.hint and f"hint: {error.hint}")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            # Nobody reads on; keep Python's own flush at exit from complaining about it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from error


app = typer.Typer(
    name="diffharness",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Differential runs of GGUF models: llama.cpp against an independent forward, on the same tokens.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"diffharness {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.add_typer(fixture.app, name="fixture")
app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("grade")(grade.grade)
app.command("matrix")(matrix.matrix)
app.command("recipe")(recipe.recipe)
app.command("gate")(gate.gate)
app.command("replay")(replay.replay)
app.command("restore")(restore.restore)
app.command("explain")(explain.explain)
app.command("compare")(compare.compare)
app.command("bisect")(bisect.bisect)
app.command("report")(report.report)
app.command("archs")(archs.archs)
app.command("damage")(damage.damage)
app.command("synth")(synth.synth)
app.command("doctor")(doctor.doctor)


def _let_flow(commands: typer.Typer) -> None:
    """Paragraphs of docstrings as one line each; else their line breaks stand among those of the terminal's width."""
    for command in commands.registered_commands:
        paragraphs = cleandoc((command.callback and command.callback.__doc__) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


_let_flow(app)
_let_flow(fixture.app)


class _Harmless(logging.Formatter):
    """Log lines, the engine's own among them, that cannot steer the terminal whatever file they quote."""

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record), LONGEST_MESSAGE)


def _on_terminate(number: int, frame: FrameType | None) -> None:
    """End as on Ctrl-C, so that workers are stopped and half-written files removed on the way out."""
    _say("terminated")
    sys.exit(128 + number)


def main() -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _on_terminate)
    handler = logging.StreamHandler()
    handler.setFormatter(_Harmless("%(message)s"))
    logging.basicConfig(handlers=[handler])
    log.setLevel(logging.WARNING)
    try:
        app()
    except KeyboardInterrupt:  # outside of a command: before it began, or as it ended
        _say("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:  # the outermost edge: whatever nobody foresaw
        _traceback_if_asked()
        said = (str(error).strip().splitlines() or ["no message"])[0]
        _say(f"internal error: {type(error).__name__}: {said}; run with -vv for the traceback")
        sys.exit(INTERNAL_ERROR)


if __name__ == "__main__":
    main()
