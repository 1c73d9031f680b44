"""`chatglm`: ChatGLM 2 and 3, GLM-4-9B. Half of each head turned in neighbouring pairs, gate and up in one matrix.

Norm, attention, add; norm, SiLU-gated feed-forward, add. Queries, keys and values may come of one matrix, and have
biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffharness.reference.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class ChatGlm(Decoder):
    """A `Decoder` whose `ffn_up` holds the gate's rows before its own."""

    interleaved: ClassVar[bool] = True
    fused_gate_up: ClassVar[bool] = True


ARCHS = {"chatglm": ChatGlm.from_metadata}
