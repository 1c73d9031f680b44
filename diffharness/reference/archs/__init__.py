"""The architectures that the reference knows: `general.architecture` to the model's builder.

Each module of this package states in `ARCHS` which architectures it is; one whose name begins with `_` holds what some
of them share. A key of the file that changes a graph and that the builder never asked for makes another model than the
one built, and is refused.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from diffharness.errors import UnsupportedError
from diffharness.reference.steps import Steps
from diffharness.weights.source import Metadata

Build = Callable[[Metadata], Steps]


def _builders() -> dict[str, Build]:
    found: dict[str, Build] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            found |= import_module(f"{__name__}.{module.name}").ARCHS
    return dict(sorted(found.items()))


BUILD: dict[str, Build] = _builders()

# Keys of llama.cpp that change a graph, and the values under which they do not.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0, 1.0),
    "attention.value_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0, 50.0),  # 50 and, below, 30: what llama.cpp writes into every file of its own
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # unset, softmax
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0, 30.0),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "router_logit_softcapping": (0.0, 30.0),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}

# Keys of sliding layers, and those of the others that they must equal in a model whose builder asks for one kind only.
TWINS: dict[str, str] = {
    "attention.key_length_swa": "attention.key_length",
    "attention.value_length_swa": "attention.value_length",
    "rope.dimension_count_swa": "rope.dimension_count",
}


class Asked(Mapping[str, Any]):
    """Metadata that remember which keys were asked for."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self.keys_asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return self._metadata[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metadata)

    def __len__(self) -> int:
        return len(self._metadata)


def build(metadata: Metadata) -> Steps:
    """The model that `metadata` describe.

    Raises UnsupportedError where the architecture is unknown, naming those that are known, or where a key changes the
    model in a way that its file here does not know; ArtifactFileError where a key is missing.
    """
    arch = metadata.get("general.architecture")
    if arch not in BUILD:
        raise UnsupportedError(
            f"expected an architecture that the reference knows, found {arch!r}",
            hint=f"known: {', '.join(BUILD)}",
        )
    asked = Asked(metadata)
    model = BUILD[arch](asked)
    twins = {name: (metadata.get(f"{arch}.{twin}"),) for name, twin in TWINS.items() if f"{arch}.{twin}" in metadata}
    for name, neutral in (NEUTRAL | twins).items():
        value = metadata.get(f"{arch}.{name}")
        if f"{arch}.{name}" not in asked.keys_asked and value is not None and value not in neutral:
            raise UnsupportedError(
                f"metadata key `{arch}.{name}` is {value!r}, which changes the model in a way that the reference "
                f"does not know",
                hint="no verdict can be given on this file; without the key it would be another model",
            )
    return model
