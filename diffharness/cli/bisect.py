"""`diffharness bisect`: the first engine of an ordered list with which verdict or numbers change."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from diffharness.cli._models import model_path
from diffharness.cli._options import RequiredModelArgument
from diffharness.cli._request import engine_settings
from diffharness.cli._shared import Shared, takes
from diffharness.errors import BadInputError

_EXIT = {"unchanged": 0, "changed": 1, "unclear": 125}


@takes("fixture tokens config override_kv device threads dtype json_file markdown quiet verbose")
def bisect(
    shared: Shared,
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
) -> None:
    """Search an ordered list of engine builds for the first with which the verdict or the numbers change.

    diffharness bisect MODEL --engines build-a/bin build-b/bin venv-c build-d/bin

    Builds that do not load are skipped. The ends are looked at first.

    Exit code: 0 no change; 1 the first changed build was found; 125 it cannot be told, as builds
    do not run; 2 unfit input.
    """
    words = _in_order(engines or [], more or [])
    model_file = model_path(model)

    from diffharness.pipeline.bisecting import BisectRequest, run
    from diffharness.report.bisect import document, line

    say = shared.say
    record = run(
        BisectRequest(
            model=model_file,
            engines=words,
            find=lambda word: engine_settings(word, shared.threads),
            tolerances=shared.tolerances(),
            on=on,
            floor=floor,
            skip_crash=skip_crash,
            fixture=shared.fixture,
            overrides=shared.overrides,
            **shared.forward,
            watch=lambda step: say(f"  {line(step)}"),
        )
    )
    shared.present(document(record), record, line=record.summary)
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
