"""`diffharness explain`: what would make the reference reproduce an engine that computes something else."""

from __future__ import annotations

from typing import Annotated

import typer

from diffharness.cli._common import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    FixtureOption,
    JsonOption,
    MarkdownOption,
    ModelArgument,
    OutOption,
    OverrideKvOption,
    QuietOption,
    StrictOption,
    ThreadsOption,
    TokensOption,
    VerboseOption,
    folder_of_run,
    keep,
    present,
    require_writable,
)
from diffharness.cli._request import command_line, engine_settings, inputs, progress_lines


def explain(
    ctx: typer.Context,
    model: ModelArgument = None,
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget", metavar="N", min=1, help="Evaluations of one layer to make at most.", show_default="600"
        ),
    ] = None,
    fixture: FixtureOption = None,
    tokens: TokensOption = None,
    config: ConfigOption = None,
    engine: EngineOption = None,
    override_kv: OverrideKvOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    dtype: DtypeOption = "float32",
    strict: StrictOption = "auto",
    out: OutOption = None,
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Where llama.cpp computes something else than the model, say what it computes instead.

    Hypotheses (another rope base, a cap or scale left out, a norm off by one, ...) are tried on the
    first layer that differs, from the engine's own input of it; those that make the reference agree
    there go through the whole model. Where none fits, what is known of the difference is shown.

    Exit code: 0 nothing to explain; 1 the engine differs; 2 unfit input; 125 inconclusive.
    """
    require_writable(json_file, markdown)
    given = inputs(model, fixture)

    from diffharness.pipeline.explaining import BUDGET
    from diffharness.pipeline.explaining import explain as explain_model
    from diffharness.pipeline.request import RunRequest
    from diffharness.report.explain import document
    from diffharness.settings import load_tolerances
    from diffharness.verdict import exit_code

    with folder_of_run(out):
        record = explain_model(
            RunRequest(
                model=given.model,
                engine=engine_settings(engine, threads),
                tolerances=load_tolerances(config),
                fixture=given.fixture,
                n_tokens=tokens,
                overrides=tuple(override_kv or ()),
                device=device,
                dtype=dtype,
                strict=strict,
                out=out,
                repro=command_line(ctx),
                say=progress_lines(quiet),
            ),
            budget=budget if budget is not None else BUDGET,
        )
        shown = document(record)
        keep(out, "explain", shown, record)
    present(shown, record, json_file, markdown)
    raise typer.Exit(exit_code(record.verdict, record.findings))
