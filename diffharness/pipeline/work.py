"""What every step of one run has at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffharness.pipeline.inputs import Inputs
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.timing import Timings


@dataclass(frozen=True)
class Work:
    """The request, its opened inputs, the folder that captures go to, and the clock."""

    request: RunRequest
    inputs: Inputs
    folder: Path
    timings: Timings

    @property
    def floors(self) -> dict[str, float]:
        """Every tolerance by name."""
        tolerances = self.request.tolerances
        return {name: tolerances[name] for name in tolerances.floors}
