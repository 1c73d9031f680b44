"""`diffharness recipe`: quantization simulated in the reference, as a ladder; a GGUF of it on request."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from diffharness.cli._common import (
    ARGUMENTS,
    DeviceOption,
    DtypeOption,
    FixtureOption,
    JsonOption,
    MarkdownOption,
    QuietOption,
    ThreadsOption,
    TokensOption,
    VerboseOption,
    present,
    progress_console,
    require_writable,
)
from diffharness.errors import BadInputError

EMBEDDED = "tiny-gemma4"
DEFAULT_LADDER = "gemma4"

CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder.", show_default="the embedded model's"),
]
RecipesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe", metavar="NAME|FILE",
        help="A name under configs/recipes, a ggml type for every matrix (Q4_0), or a .yaml file. Repeatable.",
    ),
]  # fmt: skip
LadderOption = Annotated[
    str | None,
    typer.Option(
        "--ladder", metavar="NAME", help="The recipes of configs/ladders.yaml under that name.",
        show_default=f"{DEFAULT_LADDER}, without --recipe",
    ),
]  # fmt: skip
WriteOption = Annotated[
    Path | None,
    typer.Option("--write", metavar="FILE", help="Write the one recipe, of ggml types, as a GGUF and read it back."),
]


def recipe(
    ctx: typer.Context,
    checkpoint: CheckpointArgument = None,
    recipes: RecipesOption = None,
    ladder: LadderOption = None,
    write: WriteOption = None,
    fixture: FixtureOption = None,
    tokens: TokensOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    dtype: DtypeOption = "float32",
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Say what quantization recipes cost, without making files: each is simulated on the checkpoint's weights.

    Without --recipe and --ladder, the ladder of the Gemma 4 recipes. Exit code: 0 done; 2 unfit input.
    """
    require_writable(json_file, markdown)
    if write is not None:
        require_writable(write)
        if write == Path("-"):
            raise BadInputError("expected a file to write the GGUF to, found -", hint="give it a name")

    from diffharness.forensics.recipes.library import load_ladder, load_recipe, unique_names
    from diffharness.pipeline.recipes import RecipeRequest, run_recipes
    from diffharness.report._format import clean
    from diffharness.report.recipe import document
    from diffharness.settings import data_dir, load_engine

    if checkpoint is None:
        checkpoint = data_dir("fixtures") / EMBEDDED / "checkpoint"
        fixture = fixture or str(data_dir("fixtures") / EMBEDDED / "heldout.json")
    named = ladder or (None if recipes else DEFAULT_LADDER)
    chosen = unique_names([*(load_ladder(named) if named else []), *map(load_recipe, recipes or [])])
    settings = load_engine("native")
    if threads is not None:
        import torch

        settings = settings.changed(threads=threads)
        torch.set_num_threads(threads)
    progress = progress_console(quiet)
    record = run_recipes(
        RecipeRequest(
            checkpoint=checkpoint,
            recipes=chosen,
            engine=settings,
            ladder=named,
            fixture=fixture,
            n_tokens=tokens,
            device=device,
            dtype=dtype,
            write=write,
            repro=shlex.join(["diffharness", *ctx.meta.get(ARGUMENTS, ())]),
            say=lambda text: progress.print(clean(text), markup=False),
        )
    )
    present(document(record), record, json_file, markdown)
