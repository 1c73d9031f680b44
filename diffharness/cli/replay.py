"""`diffharness replay`: every node of the engine's graph, recomputed from its own inputs."""

from __future__ import annotations

from typing import Annotated

import typer

from diffharness.cli._models import inputs
from diffharness.cli._options import ModelArgument
from diffharness.cli._shared import Shared, takes

BatchOption = Annotated[
    int, typer.Option("--tokens", metavar="N", min=2, help="Tokens of the fixture that are evaluated together.")
]
SingleOption = Annotated[
    int, typer.Option("--single", metavar="N", min=0, help="Tokens after them that are evaluated one at a time.")
]


@takes("fixture config engine override_kv device threads json_file markdown quiet verbose")
def replay(
    shared: Shared,
    model: ModelArgument = None,
    tokens: BatchOption = 64,
    single: SingleOption = 2,
) -> None:
    """Recompute every node of llama.cpp's graph from the very inputs that it had, and name those
    that are wrong.

    Activations are quantized as ggml does it before its dot products, so that what is left is the
    order of summation. A wrong node is tried again under other settings: the answer says which
    of them cures it. Any architecture will do: no reference is needed.

    Exit code: 0 agree; 1 a kernel is wrong, or the engine died; 2 unfit input; 125 nothing was compared.
    """
    given = inputs(model, shared.fixture)

    from diffharness.pipeline.replaying import ReplayRequest, replay_model
    from diffharness.pipeline.request import RunRequest
    from diffharness.report.replay import document
    from diffharness.verdict import exit_code

    record = replay_model(
        ReplayRequest(
            RunRequest(
                model=given.model,
                engine=shared.settings(),
                tolerances=shared.tolerances(),
                fixture=given.fixture,
                overrides=shared.overrides,
                **shared.forward,
            ),
            n_batch=tokens,
            n_single=single,
        )
    )
    shared.present(document(record), record)
    raise typer.Exit(exit_code(record.verdict, record.findings))
