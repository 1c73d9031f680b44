"""`minimax-m2`: MiniMax M2. Queries and keys are normalised over all heads at once; experts are scored by a sigmoid.

Part of each head turns, in half-split order. Every layer has routed experts: a bias is added to their scores for the
choice, and the weights of the chosen sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffharness.errors import ArtifactFileError
from diffharness.reference.decoder import Decoder, WideNorms, read_routing
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class MiniMaxM2(WideNorms, Decoder):
    """A `Decoder` of wide norms and sigmoid experts."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        if not fields["n_expert"]:
            raise ArtifactFileError(f"required metadata key `{hp.key('expert_count')}` is missing or zero")
        # All published models normalise; what the files say of it is not read by the engine either.
        return fields | read_routing(hp, gating="sigmoid") | {"normalise_experts": True}


ARCHS = {"minimax-m2": MiniMaxM2.from_metadata}
