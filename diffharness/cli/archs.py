"""`diffharness archs`: the architectures that are supported, and what of each."""

from __future__ import annotations

import json
import re
from importlib import import_module
from typing import Any

from diffharness.cli._common import JsonOption, VerboseOption, emit, printing, result_console

PARTS = ("reference", "engine", "checkpoint")


def archs(json_file: JsonOption = None, verbose: VerboseOption = 0) -> None:
    """List the architectures that are supported, and what of each.

    reference: our own forward. engine: llama.cpp's node names are mapped to taps.

    checkpoint: names, layouts and hyperparameters translate to and from Hugging Face's.
    """
    from rich.table import Table

    rows = supported()
    emit(json_file, json.dumps(rows, indent=2))
    table = Table(box=None, pad_edge=False)
    for head in ("arch", "model_type", *PARTS, "what"):
        table.add_column(head, overflow="fold")
    for row in rows:
        marks = ["yes" if row[part] else "no" for part in PARTS]
        table.add_row(row["arch"], "\n".join(row["model_types"]), *marks, row["what"])
    with printing():
        result_console(json_file).print(table)


def supported() -> list[dict[str, Any]]:
    """One entry for each architecture, sorted by name."""
    from diffharness.engine.nodes import BY_NAME
    from diffharness.reference.archs import BUILD
    from diffharness.weights.names import MAPS

    return [
        {
            "arch": arch,
            "what": _first_line(arch) if arch in BUILD else "",
            "model_types": list(MAPS[arch].model_types) if arch in MAPS else [],
            "classes": list(MAPS[arch].architectures) if arch in MAPS else [],
            "reference": arch in BUILD,
            "engine": arch in BY_NAME,
            "checkpoint": arch in MAPS,
        }
        for arch in sorted(MAPS.keys() | BUILD.keys() | BY_NAME.keys())
    ]


def _first_line(arch: str) -> str:
    """What the file of an architecture's forward says that it is."""
    lines = (import_module(f"diffharness.reference.archs.{arch}").__doc__ or "").strip().splitlines()
    if not lines:
        return ""
    # "`llama`: Llama 1 to 3, ...", "`qwen2` (Qwen 2, 2.5): ...": the name stands in a column of its own
    return re.sub(r"^`\w+`(?: \((.*?)\))?: ", lambda m: f"{m[1]}: " if m[1] else "", lines[0]).rstrip(".")
