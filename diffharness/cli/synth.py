"""`diffharness synth`: a tiny random model of an architecture, to try things on and to attach to reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffharness.cli._shared import Shared, takes

_ARCHITECTURE = "The architecture; some have more layers than asked, to have every kind."


@takes("engine json_file markdown quiet verbose")
def synth(
    shared: Shared,
    arch: Annotated[str, typer.Argument(metavar="ARCH", help="An architecture of `diffharness archs`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for GGUF, checkpoint and fixture.")],
    type_name: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="Of the matrices: F32, Q8_0, Q4_K, ...")
    ] = "F32",
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of weights and ids.")] = 0,
    layers: Annotated[int, typer.Option("--layers", metavar="N", min=1, max=1024, help=_ARCHITECTURE)] = 4,
    width: Annotated[int, typer.Option("--width", metavar="N", min=2, help="Of the residual stream.")] = 64,
    heads: Annotated[int, typer.Option("--heads", metavar="N", min=1, max=4096, help="Of attention.")] = 4,
    kv_heads: Annotated[int, typer.Option("--kv-heads", metavar="N", min=1, max=4096, help="Of keys and values.")] = 2,
    head_size: Annotated[int, typer.Option("--head-size", metavar="N", min=2, help="Where stated.")] = 32,
    ff: Annotated[int, typer.Option("--ff", metavar="N", min=1, help="Of a dense feed-forward.")] = 96,
    experts: Annotated[int, typer.Option("--experts", metavar="N", min=1, max=4096, help="Where there are any.")] = 6,
    experts_used: Annotated[int, typer.Option("--experts-used", metavar="N", min=1, help="By each token.")] = 2,
    expert_ff: Annotated[int, typer.Option("--expert-ff", metavar="N", min=1, help="Of one expert.")] = 64,
    window: Annotated[int, typer.Option("--window", metavar="N", min=1, help="Keys that a sliding layer sees.")] = 24,
    vocab: Annotated[int, typer.Option("--vocab", metavar="N", min=4, help="Tokens; there is no tokenizer.")] = 160,
    context: Annotated[int, typer.Option("--context", metavar="N", min=1, help="Positions in training.")] = 256,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Random ids of the fixture.")] = 128,
    set_keys: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of config.json, its value as JSON. Repeatable."),
    ] = None,
) -> None:  # fmt: skip
    """Make a tiny random model of an architecture, as GGUF and as checkpoint, and ids to run it on.

    The same options make the same files everywhere. Weights are scaled so that every feature of the
    architecture matters; an architecture takes of the sizes what it has. A synthetic model that is
    there already is replaced.

    Exit code: 0 done; 2 an unknown architecture, sizes that make no model, or a place that does not take it.
    """
    from diffharness.pipeline import synthesizing
    from diffharness.report.synth import document
    from diffharness.weights.names._map import Sizes

    record = synthesizing.run(
        synthesizing.SynthRequest(
            arch=arch,
            out=out,
            engine=shared.settings(),
            sizes=Sizes(
                n_layer=layers,
                n_embd=width,
                n_head=heads,
                n_head_kv=kv_heads,
                head_dim=head_size,
                n_ff=ff,
                n_vocab=vocab,
                n_expert=experts,
                n_expert_used=experts_used,
                n_ff_expert=expert_ff,
                window=window,
                n_ctx=context,
            ),
            type_name=type_name,
            seed=seed,
            n_tokens=tokens,
            changes=synthesizing.parse_changes(set_keys or []),
            repro=shared.repro,
        )
    )
    shared.present(document(record), record)
