"""`diffharness explain`: what would make the reference reproduce an engine that computes something else."""

from __future__ import annotations

from typing import Annotated

import typer

from diffharness.cli._models import inputs
from diffharness.cli._options import ModelArgument
from diffharness.cli._output import folder_of_run
from diffharness.cli._shared import Shared, takes


@takes("fixture tokens config engine override_kv device threads dtype strict out json_file markdown quiet verbose")
def explain(
    shared: Shared,
    model: ModelArgument = None,
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget", metavar="N", min=1, help="Evaluations of one layer to make at most.", show_default="600"
        ),
    ] = None,
) -> None:
    """Where llama.cpp computes something else than the model, say what it computes instead.

    Hypotheses (another rope base, a cap or scale left out, a norm off by one, ...) are tried on the
    first layer that differs, from the engine's own input of it; those that make the reference agree
    there go through the whole model. Where none fits, what is known of the difference is shown.

    Exit code: 0 nothing to explain; 1 the engine differs; 2 unfit input; 125 inconclusive.
    """
    given = inputs(model, shared.fixture)

    from diffharness.pipeline.explaining import BUDGET
    from diffharness.pipeline.explaining import explain as explain_model
    from diffharness.pipeline.request import RunRequest
    from diffharness.report.explain import document
    from diffharness.verdict import exit_code

    with folder_of_run(shared.out):
        record = explain_model(
            RunRequest(
                model=given.model,
                engine=shared.settings(),
                tolerances=shared.tolerances(),
                fixture=given.fixture,
                overrides=shared.overrides,
                strict=shared.strict,
                out=shared.out,
                **shared.forward,
            ),
            budget=budget if budget is not None else BUDGET,
        )
        shown = document(record)
        shared.keep("explain", shown, record)
    shared.present(shown, record)
    raise typer.Exit(exit_code(record.verdict, record.findings))
