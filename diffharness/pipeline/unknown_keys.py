"""Metadata keys of an artifact that nobody knows: a feature that both sides of the graph leg would miss, or a slip."""

from __future__ import annotations

from diffharness.engine.known_keys import known_keys
from diffharness.engine.runner import EngineRun
from diffharness.forensics.metadata import unread
from diffharness.weights.gguf_file import GgufFile


def unknown_keys(artifact: GgufFile, run: EngineRun) -> list[str]:
    """Hyperparameters (`<arch>.*`) that the reference does not ask for, and that the engine of this run never reads.

    Empty where the engine's library does not tell what it reads.
    """
    known = known_keys(str(run.info.get("library")))
    if known is None:
        return []
    return [key for key in unread(artifact.metadata, artifact.arch) if not known.has(key, artifact.arch)]
