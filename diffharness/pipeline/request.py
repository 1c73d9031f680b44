"""What one run is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from diffharness.settings import EngineSettings, Tolerances

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunRequest:
    """One run. `engine` is the native engine's settings; overrides go to the engine only."""

    model: Path
    engine: EngineSettings
    tolerances: Tolerances
    checkpoint: Path | None = None
    fixture: str | None = None
    n_tokens: int | None = None
    overrides: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    out: Path | None = None
    repro: str = ""
    say: Say = field(default=lambda text: None, repr=False)
