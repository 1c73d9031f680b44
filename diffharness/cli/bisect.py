"""`diffharness bisect`: the first engine of an ordered list with which verdict or numbers change."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from diffharness.cli._common import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    FixtureOption,
    JsonOption,
    MarkdownOption,
    OverrideKvOption,
    QuietOption,
    RequiredModelArgument,
    ThreadsOption,
    TokensOption,
    VerboseOption,
    model_path,
    present,
    require_writable,
)
from diffharness.cli._request import command_line, engine_settings, progress_lines
from diffharness.errors import BadInputError

_EXIT = {"unchanged": 0, "changed": 1, "unclear": 125}


def bisect(
    ctx: typer.Context,
    model: RequiredModelArgument,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[ENGINE]...", help="The engines after the first.")
    ] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engines",
            metavar="ENGINE...",
            help="The engines, oldest first: each a name, a YAML file, a folder of libraries, or a Python. The first "
            "is what the others are compared with.",
        ),
    ] = None,
    on: Annotated[
        Literal["verdict", "numbers", "either"],
        typer.Option("--on", help="What must change. With numbers alone the reference does not run."),
    ] = "either",
    floor: Annotated[
        float | None,
        typer.Option(
            "--floor",
            metavar="NMSE",
            min=0.0,
            show_default="1e-6, as llama-results",
            help="Logits NMSE from the first engine's above which the numbers have changed.",
        ),
    ] = None,
    skip_crash: Annotated[
        bool,
        typer.Option("--skip-crash", help="Skip engines that die over the tokens, instead of calling it a change."),
    ] = False,
    fixture: FixtureOption = None,
    tokens: TokensOption = None,
    config: ConfigOption = None,
    override_kv: OverrideKvOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    dtype: DtypeOption = "float32",
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Search an ordered list of engine builds for the first with which the verdict or the numbers change.

    diffharness bisect MODEL --engines build-a/bin build-b/bin venv-c build-d/bin

    Builds that do not load are skipped. The ends are looked at first.

    Exit code: 0 no change; 1 the first changed build was found; 125 it cannot be told, as builds
    do not run; 2 unfit input.
    """
    require_writable(json_file, markdown)
    words = _in_order(engines or [], more or [])
    model_file = model_path(model)

    from diffharness.pipeline.bisecting import BisectRequest, run
    from diffharness.report.bisect import document, line
    from diffharness.settings import load_tolerances

    say = progress_lines(quiet)
    record = run(
        BisectRequest(
            model=model_file,
            engines=words,
            find=lambda word: engine_settings(word, threads),
            tolerances=load_tolerances(config),
            on=on,
            floor=floor,
            skip_crash=skip_crash,
            fixture=fixture,
            n_tokens=tokens,
            overrides=tuple(override_kv or ()),
            device=device,
            dtype=dtype,
            repro=command_line(ctx),
            say=say,
            watch=lambda step: say(f"  {line(step)}"),
        )
    )
    present(document(record), record, json_file, markdown, line=record.summary if quiet else None)
    raise typer.Exit(_EXIT[record.outcome])


def _in_order(named: list[str], more: list[str]) -> list[str]:
    """The list as it was written. BadInputError where the parser cannot know the order, or took MODEL for an engine."""
    if more and len(named) != 1:
        found = "none" if not named else f"{len(named)} of them and {len(more)} words besides"
        raise BadInputError(
            f"expected one --engines with the list behind it, found {found}",
            hint="diffharness bisect MODEL --engines A B C, or --engines A --engines B --engines C",
        )
    words = [*named, *more]
    models = [word for word in words if word.endswith(".gguf")]
    if models:
        raise BadInputError(
            f"expected engines, found the model {models[0]}", hint="diffharness bisect MODEL --engines A B C"
        )
    return words
