"""`diffharness grade`: many artifacts on one fixture, against one checkpoint, in one table."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from diffharness.cli._models import model_path
from diffharness.cli._options import CheckpointOption
from diffharness.cli._output import folder_of_run
from diffharness.cli._shared import Shared, takes


@takes("fixture tokens config engine override_kv device threads dtype out json_file markdown quiet verbose")
def grade(
    shared: Shared,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="GGUFs: paths, or hf://owner/repo/file.gguf.")
    ],
    checkpoint: CheckpointOption = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="GGUF", help="Measure against this artifact instead of a checkpoint."),
    ] = None,
    control: Annotated[
        bool,
        typer.Option("--control", help="Grade the checkpoint freshly quantized to each artifact's types as well."),
    ] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="Compare how attention is spread, by layer and head.")
    ] = False,
    no_engine: Annotated[bool, typer.Option("--no-engine", help="Leave llama.cpp's own perplexities out.")] = False,
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", metavar="N", min=3, help="Cut the fixture into chunks of N tokens."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print every statistic that llama-perplexity --kl-divergence prints.")
    ] = False,
    matmul: Annotated[
        Literal["full", "bf16"],
        typer.Option(
            "--matmul",
            help="Products with weights in --dtype, or in bfloat16: for a first look at a large model, with the noise "
            "stated. Faster on CPUs with AVX512-BF16 or AMX, and on GPUs; slower elsewhere.",
        ),
    ] = "full",
) -> None:
    """Grade GGUFs: perplexity by the reference and by llama.cpp, KL and agreement against the
    checkpoint.

    Without --checkpoint and --against, perplexities only. Without --tokens, the fixture's
    first 2048. A --chunk longer than the model's sliding window and than llama.cpp's
    n_ubatch (512) shows what only breaks on long prompts.

    Exit code: 0 graded; 1 an artifact lost more than its --control; 2 unfit input, or an
    artifact was not graded.
    """
    from diffharness.pipeline.grade_inputs import GradeRequest
    from diffharness.pipeline.grading import grade as grade_all
    from diffharness.pipeline.grading import has_errors, is_beyond
    from diffharness.report.grade import document

    with folder_of_run(shared.out):
        record = grade_all(
            GradeRequest(
                models=tuple(models),
                engine=shared.settings(),
                tolerances=shared.tolerances(),
                checkpoint=checkpoint,
                against=against,
                fixture=shared.fixture,
                chunk=chunk,
                with_engine=not no_engine,
                with_control=control,
                with_attention=attention,
                overrides=shared.overrides,
                matmul=matmul,
                out=shared.out,
                locate=model_path,
                **shared.forward,
            )
        )
        shown = document(record, full=full)
        shared.keep("grade", shown, record)
    shared.present(shown, record)
    raise typer.Exit(2 if has_errors(record) else 1 if is_beyond(record) else 0)
