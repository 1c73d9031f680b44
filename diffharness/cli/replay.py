"""`diffharness replay`: every node of the engine's graph, recomputed from its own inputs."""

from __future__ import annotations

from typing import Annotated

import typer

from diffharness.cli._common import (
    ConfigOption,
    DeviceOption,
    EngineOption,
    FixtureOption,
    JsonOption,
    MarkdownOption,
    ModelArgument,
    OverrideKvOption,
    QuietOption,
    ThreadsOption,
    VerboseOption,
    present,
    require_writable,
)
from diffharness.cli._request import command_line, engine_settings, inputs, progress_lines

BatchOption = Annotated[
    int, typer.Option("--tokens", metavar="N", min=2, help="Tokens of the fixture that are evaluated together.")
]
SingleOption = Annotated[
    int, typer.Option("--single", metavar="N", min=0, help="Tokens after them that are evaluated one at a time.")
]


def replay(
    ctx: typer.Context,
    model: ModelArgument = None,
    fixture: FixtureOption = None,
    tokens: BatchOption = 64,
    single: SingleOption = 2,
    config: ConfigOption = None,
    engine: EngineOption = None,
    override_kv: OverrideKvOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Recompute every node of llama.cpp's graph from the very inputs that it had, and name those
    that are wrong.

    Activations are quantized as ggml does it before its dot products, so that what is left is the
    order of summation. A wrong node is tried again under other settings: the answer says which
    of them cures it. Any architecture will do: no reference is needed.

    Exit code: 0 agree; 1 a kernel is wrong, or the engine died; 2 unfit input; 125 nothing was compared.
    """
    require_writable(json_file, markdown)
    given = inputs(model, fixture)

    from diffharness.pipeline.replaying import ReplayRequest, replay_model
    from diffharness.pipeline.request import RunRequest
    from diffharness.report.replay import document
    from diffharness.settings import load_tolerances
    from diffharness.verdict import exit_code

    record = replay_model(
        ReplayRequest(
            RunRequest(
                model=given.model,
                engine=engine_settings(engine, threads),
                tolerances=load_tolerances(config),
                fixture=given.fixture,
                overrides=tuple(override_kv or ()),
                device=device,
                repro=command_line(ctx),
                say=progress_lines(quiet),
            ),
            n_batch=tokens,
            n_single=single,
        )
    )
    present(document(record), record, json_file, markdown)
    raise typer.Exit(exit_code(record.verdict, record.findings))
