"""What an engine's settings can be run on: a GGUF file, or whatever stands for one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from diffharness.engine.runner import Engine, EngineRun
from diffharness.settings import EngineSettings

Chunk = Sequence[int] | NDArray[np.int64]
Chunks = Sequence[Chunk]


class How(TypedDict, total=False):
    """What a capture is to hold; see `Engine.capture`."""

    taps: Sequence[str] | None
    overrides: Sequence[str]
    meta: Mapping[str, str] | None
    trace: bool


class EngineModel(Protocol):
    """A model that can be captured, in one file or not."""

    def capture(
        self,
        settings: EngineSettings,
        chunks: Chunks,
        out: str | os.PathLike[str],
        **how: Unpack[How],
    ) -> EngineRun:
        """As `Engine.capture` under these settings."""
        ...


@dataclass(frozen=True)
class OneFile:
    """A GGUF file."""

    path: Path

    def capture(
        self,
        settings: EngineSettings,
        chunks: Chunks,
        out: str | os.PathLike[str],
        **how: Unpack[How],
    ) -> EngineRun:
        """As `Engine.capture` under these settings."""
        return Engine(settings).capture(self.path, chunks, out, **how)
