"""`diffharness damage`: a copy of a GGUF with known faults, to try the other commands on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffharness.cli._models import model_path
from diffharness.cli._options import CheckpointOption
from diffharness.cli._request import progress_lines
from diffharness.cli._shared import Shared, takes
from diffharness.errors import BadInputError


@takes("engine json_file markdown quiet verbose")
def damage(
    shared: Shared,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A GGUF: a path, or hf://owner/repo/file.gguf.")
    ] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The damaged copy.")] = None,
    how: Annotated[
        list[str] | None,
        typer.Option("--how", metavar="NAME[:STRENGTH]", help="A fault of --list. Repeatable: done in that order."),
    ] = None,
    tensors: Annotated[
        str | None,
        typer.Option(
            "--tensors", metavar="GLOB", help="Where: blk.*.attn_q.weight; several split by commas.",
            show_default="by the fault",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="A-B", help="Only in these layers, such as 2-5,7.", show_default="all"),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", metavar="X", help="How strongly; --list says what it means.",
                     show_default="by the fault"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of all random choices.")] = 0,
    type_name: Annotated[
        Literal["keep", "F32"], typer.Option("--type", help="How values that were computed anew are stored.")
    ] = "keep",
    set_keys: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=TYPE:VALUE", help="Change or add a metadata key. Repeatable."),
    ] = None,
    drop_keys: Annotated[
        list[str] | None, typer.Option("--drop", metavar="KEY", help="Remove a metadata key. Repeatable.")
    ] = None,
    checkpoint: CheckpointOption = None,
    list_faults: Annotated[bool, typer.Option("--list", help="Say what faults there are, and stop.")] = False,
) -> None:  # fmt: skip
    """Make a copy of a GGUF with known, seeded faults: for tests, demos, and to try the other
    commands.

    Damaged tensors keep their type, so that the type gives nothing away; with --checkpoint
    they start from the checkpoint's values, not from the artifact's. The copy's metadata
    key diffharness.damage says what was done.

    Exit code: 0 done; 2 unfit input, or a fault that would change nothing.
    """
    from diffharness.damage import Options
    from diffharness.layers import parse_layers
    from diffharness.pipeline import damaging
    from diffharness.report.damage import document

    if list_faults:
        record = damaging.listed()
        shared.present(document(record), record)
        return
    if model is None or out is None:
        raise BadInputError(
            f"expected MODEL and OUT, found {model or 'neither'}", hint="diffharness damage MODEL OUT --how NAME"
        )
    record = damaging.run(
        damaging.DamageRequest(
            source=model_path(model),
            out=out,
            how=how or [],
            engine=shared.settings(),
            seed=seed,
            options=Options(tensors, parse_layers(layers) if layers is not None else None, strength, type_name),
            checkpoint=checkpoint,
            set_keys=set_keys or [],
            drop_keys=drop_keys or [],
            repro=shared.repro,
        )
    )
    if record.truncated_from is not None:
        progress_lines(quiet=False)(f"{out} was cut short on purpose: nothing can read it as a GGUF")
    shared.present(document(record), record)
