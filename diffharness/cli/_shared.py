"""The options that commands share, taken by name: a command says which, and gets them in one piece.

    @takes("fixture tokens config json_file markdown quiet verbose")
    def command(shared: Shared, own: OwnOption = None) -> None: ...

is to typer a command with the options `own`, `fixture`, `tokens` and so on, in that order.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_type_hints

import typer

from diffharness.cli import _output
from diffharness.cli._options import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    FixtureOption,
    JsonOption,
    MarkdownOption,
    OutOption,
    OverrideKvOption,
    QuietOption,
    StrictOption,
    ThreadsOption,
    TokensOption,
    VerboseOption,
)
from diffharness.cli._request import command_line, engine_settings, progress_lines

if TYPE_CHECKING:
    from diffharness.records import Record
    from diffharness.report.document import Document
    from diffharness.settings import EngineSettings, Tolerances

Say = Callable[[str], None]


class Forward(TypedDict):
    """What every request for a forward of the reference has, by the names that it has there."""

    repro: str
    n_tokens: int | None
    device: str
    dtype: Literal["float32", "float64"]
    say: Say


@dataclass(frozen=True)
class Shared:
    """The shared options. Those that a command does not take keep the values that they have here."""

    fixture: FixtureOption = None
    tokens: TokensOption = None
    config: ConfigOption = None
    engine: EngineOption = None
    override_kv: OverrideKvOption = None
    device: DeviceOption = "cpu"
    threads: ThreadsOption = None
    dtype: DtypeOption = "float32"
    strict: StrictOption = "auto"
    out: OutOption = None
    json_file: JsonOption = None
    markdown: MarkdownOption = None
    quiet: QuietOption = False
    verbose: VerboseOption = 0
    repro: str = ""  # no option: the command that does this again

    @property
    def say(self) -> Say:
        """Prints lines of progress."""
        return progress_lines(self.quiet)

    @property
    def overrides(self) -> tuple[str, ...]:
        """`--override-kv`, as often as it was given."""
        return tuple(self.override_kv or ())

    @property
    def forward(self) -> Forward:
        """How the reference is to run. SettingsError for a device that torch cannot use."""
        from diffharness.reference.device import usable

        usable(self.device)
        return {
            "repro": self.repro,
            "n_tokens": self.tokens,
            "device": self.device,
            "dtype": self.dtype,
            "say": self.say,
        }

    def settings(self) -> EngineSettings:
        """The settings of `--engine`, with `--threads`; see `engine_settings`."""
        return engine_settings(self.engine, self.threads)

    def tolerances(self) -> Tolerances:
        """The tolerances of `--config`, the shipped ones without."""
        from diffharness.settings import load_tolerances

        return load_tolerances(self.config)

    def present(self, document: Document, record: Record, *, line: str | None = None) -> None:
        """The result to where it was asked for; with -q the human gets `line` alone, where there is one."""
        shown = line if self.quiet else None
        _output.present(document, record, self.json_file, self.markdown, line=shown)

    def keep(self, name: str, document: Document, record: Record) -> None:
        """The result as NAME.json and NAME.md in the folder of `--out`, if there is one."""
        _output.keep(self.out, name, document, record)


Command = Callable[..., None]
_CONTEXT = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


def takes(names: str) -> Callable[[Command], Command]:
    """A command with these of `Shared`'s options behind its own; it gets them as its first parameter, `shared`.

    Before it starts, the files that `--json` and `--markdown` name are tried: OutputError where one could not be made.
    """
    chosen = names.split()
    types = get_type_hints(Shared, include_extras=True)
    defaults = {field.name: field.default for field in fields(Shared)}
    taken = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=types[name])
        for name in chosen
    ]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in signature.parameters.values()
            if parameter.name != "shared"
        ]

        @functools.wraps(command)
        def wrapped(ctx: typer.Context, **values: Any) -> None:
            shared = Shared(repro=command_line(ctx), **{name: values.pop(name) for name in chosen})
            _output.require_writable(shared.json_file, shared.markdown)
            command(shared, **values)

        # typer reads both: what the wrapper takes, not what the command does
        parameters = [_CONTEXT, *own, *taken]
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate
