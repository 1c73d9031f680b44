"""`diffharness archs`: the architectures that are supported, and what of each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffharness.cli._options import JsonOption, VerboseOption
from diffharness.cli._output import emit, printing, result_console

if TYPE_CHECKING:
    from diffharness.weights.names import ArchMap


def archs(json_file: JsonOption = None, verbose: VerboseOption = 0) -> None:
    """List the architectures that are supported, and what the reference's forward of each was held against.

    Of every one a random model is made (`diffharness synth`), and the reference must agree with llama.cpp's strict
    engine on it, tap by tap; where transformers has the model, with transformers too.

    Exit code: 0.
    """
    from rich.table import Table

    rows = supported()
    emit(json_file, json.dumps(rows, indent=2))
    table = Table(box=None, pad_edge=False)
    for head in ("arch", "model_type", "held against", "what"):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(row["arch"], "\n".join(row["model_types"]), "\n".join(row["witnesses"]), row["what"])
    with printing():
        console = result_console(json_file)
        console.print(table)
        console.print(f"\n{len(rows)} architectures")


def supported() -> list[dict[str, Any]]:
    """One entry for each architecture, sorted by name."""
    from diffharness.reference.archs import BUILD
    from diffharness.weights.names import MAPS

    return [
        {
            "arch": arch,
            "what": _first_line(BUILD[arch]),
            "model_types": list(MAPS[arch].model_types),
            "classes": list(MAPS[arch].architectures),
            "witnesses": [*_transformers(MAPS[arch]), "llama.cpp"],
        }
        for arch in sorted(MAPS.keys() & BUILD.keys())
    ]


def _transformers(arch_map: ArchMap) -> list[str]:
    """transformers as a witness, and in what way if not by the model as it has it."""
    if arch_map.transformers:
        return ["transformers"]
    return [f"transformers ({arch_map.otherwise})"] if arch_map.otherwise else []


def _first_line(build: Callable[..., Any]) -> str:
    """What the file of an architecture's forward says that it is."""
    lines = (import_module(build.__self__.__module__).__doc__ or "").strip().splitlines()  # type: ignore[attr-defined]
    if not lines:
        return ""
    # "`llama`: Llama 1 to 3, ...", "`qwen2` (Qwen 2, 2.5): ...": the name stands in a column of its own
    return re.sub(r"^(?:`[\w-]+`(?:, )?)+(?: \((.*?)\))?: ", lambda m: f"{m[1]}: " if m[1] else "", lines[0]).rstrip(
        "."
    )
