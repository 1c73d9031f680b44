"""The architectures that the reference knows: `general.architecture` to the model's builder."""

from __future__ import annotations

from diffharness.errors import UnsupportedError
from diffharness.reference.archs.gemma2 import Gemma2
from diffharness.reference.archs.gemma3 import Gemma3
from diffharness.reference.archs.gemma4 import Gemma4
from diffharness.reference.archs.llama import Llama
from diffharness.reference.archs.qwen2 import Qwen2
from diffharness.reference.archs.qwen3 import Qwen3
from diffharness.reference.archs.qwen3moe import Qwen3Moe
from diffharness.reference.model import BuildModel, Model
from diffharness.weights.source import Metadata

BUILD: dict[str, BuildModel] = {
    "gemma2": Gemma2.from_metadata,
    "gemma3": Gemma3.from_metadata,
    "gemma4": Gemma4.from_metadata,
    "llama": Llama.from_metadata,
    "qwen2": Qwen2.from_metadata,
    "qwen3": Qwen3.from_metadata,
    "qwen3moe": Qwen3Moe.from_metadata,
}


def build(metadata: Metadata) -> Model:
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
    return BUILD[arch](metadata)
