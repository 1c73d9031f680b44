"""`diffharness restore`: put parts of the checkpoint back into an artifact, and see what that repairs."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from diffharness.cli._models import model_path
from diffharness.cli._options import RequiredCheckpointOption, RequiredModelArgument
from diffharness.cli._shared import Shared, takes
from diffharness.errors import BadInputError


@takes("fixture tokens config engine device threads dtype json_file markdown quiet verbose")
def restore(
    shared: Shared,
    model: RequiredModelArgument,
    checkpoint: RequiredCheckpointOption,
    by: Annotated[
        Literal["class", "layer", "block"] | None,
        typer.Option("--by", help="What is put back together.", show_default="class"),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", metavar="A-B", help="These layers as one group; with --by cut further. Repeatable."),
    ] = None,
    tensors: Annotated[
        list[str] | None,
        typer.Option(
            "--tensors", metavar="GLOB", help="Tensors as one group, such as 'blk.*.attn_q.weight'. Repeatable."
        ),
    ] = None,
    into: Annotated[
        Literal["artifact", "checkpoint", "both"],
        typer.Option("--into", help="Put groups into the artifact, or the artifact's into the checkpoint."),
    ] = "artifact",
    search: Annotated[
        bool, typer.Option("--search", help="Find a smallest set of groups whose restoration is enough.")
    ] = False,
    within: Annotated[
        str,
        typer.Option("--within", metavar="SHARE", help="With --search: how near to the sound perplexity is enough."),
    ] = "1%",
    budget: Annotated[
        int, typer.Option("--budget", metavar="N", min=1, help="With --search: forwards that it may take.")
    ] = 60,
) -> None:
    """Put groups of tensors back from the checkpoint, and grade each mixture by the reference.

    By default one class after another. Where the file loses more than its types do, the
    other direction is run as well, which tells damage from a sound model of another origin.
    No engine runs but its quantizer, for the control.

    Exit code: 0 agree; 1 a verdict against the artifact; 2 unfit input; 125 inconclusive.
    """
    share = parse_share(within)
    model_file = model_path(model)

    from diffharness.pipeline.restoring import RestoreRequest
    from diffharness.pipeline.restoring import restore as restore_all
    from diffharness.report.restore import document
    from diffharness.verdict import exit_code

    record = restore_all(
        RestoreRequest(
            model=model_file,
            checkpoint=checkpoint,
            engine=shared.settings(),
            tolerances=shared.tolerances(),
            fixture=shared.fixture,
            by=by,
            layers=tuple(layers or ()),
            tensors=tuple(tensors or ()),
            into=into,
            search=search,
            within=share,
            budget=budget,
            **shared.forward,
        )
    )
    shared.present(document(record), record)
    raise typer.Exit(exit_code(record.verdict, record.findings))


def parse_share(text: str) -> float:
    """0.01 for `1%` and for `0.01`. BadInputError for what is no share from 0 to 1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise BadInputError(f"expected --within as a share such as 1% or 0.01, found {text!r}")
    return value
