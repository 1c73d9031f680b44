"""`arcee`: AFM. Llama's forward with a feed-forward that has no gate: down(relu(up(x))²)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffharness.reference.archs.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Arcee(Llama):
    """Differs from Llama in the activation; that there is no gate, the file says."""

    activation: ClassVar[str] = "relu_sqr"


ARCHS = {"arcee": Arcee.from_metadata}
