"""What one run is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffharness.settings import EngineSettings, Tolerances

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunRequest:
    """One run. `engine` is the native engine's settings, `others` are compared with it; overrides go to both."""

    model: Path
    engine: EngineSettings
    tolerances: Tolerances
    checkpoint: Path | None = None
    fixture: str | None = None
    n_tokens: int | None = None
    others: tuple[EngineSettings, ...] = ()
    overrides: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    kernel_tokens: int = 64  # whose nodes are replayed, 0 for none
    grid: str | None = "small"  # of configs/matrix.yaml
    explain: bool = True  # what makes a failing graph leg agree
    noise: bool = True  # the native run's error taken apart
    strict: Literal["auto", "whole", "slices"] = "auto"  # the F32 model: in one file, or by slices of layers
    slice_layers: int | None = None  # at most, where cuts are possible that near to each other
    out: Path | None = None
    repro: str = ""
    say: Say = field(default=lambda text: None, repr=False)
