"""`dbrx`: Databricks' DBRX. LayerNorms without bias, a clamp on queries, keys and values, experts in every layer.

The three come of one matrix and are clamped together, before the rotation (half-split order). The norm before the
experts is the file's `attn_output_norm`. The routed experts' weights sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffharness.errors import ArtifactFileError
from diffharness.reference.archs.olmo import Clamped
from diffharness.reference.decoder import LayerNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.weights.names.dbrx import PLAIN_WEIGHTS


@dataclass(frozen=True, kw_only=True)
class Dbrx(LayerNorms, Clamped):
    """A `Clamped` decoder with LayerNorms and experts."""

    ffn_norm: ClassVar[str] = "attn_output_norm.weight"

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        if not fields["n_expert"]:
            raise ArtifactFileError(f"required metadata key `{hp.key('expert_count')}` is missing or zero")
        return fields | {
            "normalise_experts": not hp.metadata.get(PLAIN_WEIGHTS, False),
            "experts_scale": hp.number("expert_weights_scale", 0.0) or 1.0,
        }


ARCHS = {"dbrx": Dbrx.from_metadata}
