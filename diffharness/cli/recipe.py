"""`diffharness recipe`: quantization simulated in the reference, as a ladder; a GGUF of it on request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffharness.cli._models import embedded
from diffharness.cli._output import require_place
from diffharness.cli._shared import Shared, takes
from diffharness.errors import BadInputError

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


@takes("fixture tokens engine device threads dtype json_file markdown quiet verbose")
def recipe(
    shared: Shared,
    checkpoint: CheckpointArgument = None,
    recipes: RecipesOption = None,
    ladder: LadderOption = None,
    write: WriteOption = None,
) -> None:
    """Say what quantization recipes cost, without making files: each is simulated on the
    checkpoint's weights.

    Without --recipe and --ladder, the ladder of the Gemma 4 recipes. Exit code: 0 done; 2
    unfit input.
    """
    if write is not None:
        if write == Path("-"):
            raise BadInputError("expected a file to write the GGUF to, found -", hint="give it a name")
        require_place(write)

    from diffharness.forensics.recipes.library import load_ladder, load_recipe, unique_names
    from diffharness.pipeline.recipes import RecipeRequest, run_recipes
    from diffharness.report.recipe import document

    fixture = shared.fixture
    if checkpoint is None:
        checkpoint, fixture = embedded().checkpoint, fixture or embedded().fixture
    if write is not None and write.resolve().parent == Path(checkpoint).resolve():
        raise BadInputError(f"expected a place outside of the checkpoint, found {write}", hint="give another folder")
    named = ladder or (None if recipes else DEFAULT_LADDER)
    rungs = load_ladder(named) if named else []
    chosen = unique_names([*rungs, *map(load_recipe, recipes or [])])
    record = run_recipes(
        RecipeRequest(
            checkpoint=checkpoint,
            recipes=chosen,
            engine=shared.settings(),
            ladder=named,
            optional=frozenset(one.name for one in rungs),
            fixture=fixture,
            write=write,
            **shared.forward,
        )
    )
    shared.present(document(record), record)
