"""`diffharness inspect`: tensor forensics, no forward."""

from __future__ import annotations

import typer

from diffharness.cli._models import model_path
from diffharness.cli._options import RequiredCheckpointOption, RequiredModelArgument
from diffharness.cli._progress import progress_bar
from diffharness.cli._shared import Shared, takes


@takes("config engine threads json_file markdown quiet verbose")
def inspect(
    shared: Shared,
    model: RequiredModelArgument,
    checkpoint: RequiredCheckpointOption,
) -> None:
    """Compare every tensor and key of a GGUF with the checkpoint's, and say what drifted, where,
    and in what pattern.

    No forward is run. Each tensor is judged by a control: the checkpoint's own, quantized
    afresh to the same type by the quantizer of the engine's build.

    Exit code: 0 agree; 1 weights, metadata or the file are damaged; 2 unfit input; 125 only
    a forward could tell.
    """
    model_file = model_path(model)

    from diffharness.pipeline.inspecting import InspectRequest
    from diffharness.pipeline.inspecting import inspect as inspect_all
    from diffharness.report.inspect import document
    from diffharness.verdict import exit_code

    with progress_bar("tensors", quiet=shared.quiet) as watch:
        record = inspect_all(
            InspectRequest(
                model=model_file,
                checkpoint=checkpoint,
                engine=shared.settings(),
                tolerances=shared.tolerances(),
                repro=shared.repro,
                say=shared.say,
                watch=watch,
            )
        )
    shared.present(document(record), record)
    raise typer.Exit(exit_code(record.verdict, record.findings))
