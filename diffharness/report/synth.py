"""What a synthetic model is, and the command that runs it."""

from __future__ import annotations

import shlex

from diffharness.records.synth import SynthRecord
from diffharness.report._format import size
from diffharness.report.document import Document, Section
from diffharness.words import counted


def document(record: SynthRecord) -> Document:
    """Files and sizes, and where rows were too narrow for the type."""
    types = ", ".join(f"{n} {name}" for name, n in sorted(record.types.items(), key=lambda item: -item[1]))
    layers = counted(record.n_layer, "layer")
    pairs = [
        ("GGUF", f"{record.gguf}, {size(record.n_bytes)}: {types}"),
        ("checkpoint", record.checkpoint),
        ("fixture", f"{record.fixture}: {record.n_tokens} random ids"),
        ("model", f"{layers}, {counted(record.n_tensors, 'tensor')}, {record.n_parameters:,} parameters"),
        ("seed", str(record.seed)),
    ]
    remarks = []
    if record.narrow:
        remarks.append(
            f"{counted(len(record.narrow), 'matrix', 'matrices')} stay F32, rows being no whole blocks: --width, --ff "
            "and --expert-ff in multiples of the block (32, or 256 for K types) let them follow"
        )
    files = (record.gguf, "--checkpoint", record.checkpoint, "--fixture", record.fixture)
    remarks.append(f"run it: diffharness run {shlex.join(files)}")
    return Document(
        "synth", "", f"{record.gguf}: a random {record.arch} model", [Section(pairs=pairs, remarks=remarks)]
    )
