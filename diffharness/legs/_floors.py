"""What a leg asks of the tolerances; `settings.Tolerances` and a plain dict both answer."""

from __future__ import annotations

from typing import Protocol


class Floors(Protocol):
    """Floors by name, such as `graph.local`."""

    def __getitem__(self, name: str, /) -> float: ...

    def get(self, name: str, default: float, /) -> float: ...
