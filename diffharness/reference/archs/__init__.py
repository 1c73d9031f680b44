"""The architectures that the reference knows: `general.architecture` to the model's builder."""

from __future__ import annotations

from collections.abc import Callable

from diffharness.errors import UnsupportedError
from diffharness.reference.archs.gemma2 import Gemma2
from diffharness.reference.archs.gemma3 import Gemma3
from diffharness.reference.archs.gemma4 import Gemma4
from diffharness.reference.archs.llama import Llama
from diffharness.reference.archs.qwen2 import Qwen2
from diffharness.reference.archs.qwen3 import Qwen3
from diffharness.reference.archs.qwen3moe import Qwen3Moe
from diffharness.reference.steps import Steps
from diffharness.weights.source import Metadata

BUILD: dict[str, Callable[[Metadata], Steps]] = {
    "gemma2": Gemma2.from_metadata,
    "gemma3": Gemma3.from_metadata,
    "gemma4": Gemma4.from_metadata,
    "llama": Llama.from_metadata,
    "qwen2": Qwen2.from_metadata,
    "qwen3": Qwen3.from_metadata,
    "qwen3moe": Qwen3Moe.from_metadata,
}


# Keys of llama.cpp that change a graph, and the values under which they do not: any other value makes
# a model that no architecture here computes.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.temperature_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # unset, softmax
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}


def build(metadata: Metadata) -> Steps:
    """The model that `metadata` describe.

    Raises UnsupportedError where the architecture is unknown, naming those that are known; ArtifactFileError where a
    key is missing.
    """
    arch = metadata.get("general.architecture")
    if arch not in BUILD:
        raise UnsupportedError(
            f"expected an architecture that the reference knows, found {arch!r}",
            hint=f"known: {', '.join(sorted(BUILD))}",
        )
    for name, neutral in NEUTRAL.items():
        value = metadata.get(f"{arch}.{name}")
        if value is not None and value not in neutral:
            raise UnsupportedError(
                f"metadata key `{arch}.{name}` is {value!r}, which changes the model in a way that the reference "
                f"does not know",
                hint="no verdict can be given on this file; without the key it would be another model",
            )
    return BUILD[arch](metadata)
