"""How many attention heads each layer has, from the metadata; head sizes follow from the tensors' shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffharness.weights.source import Metadata


@dataclass(frozen=True)
class Heads:
    """Query and KV heads by layer; 0 where the metadata do not say."""

    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]

    @classmethod
    def of(cls, metadata: Metadata) -> Heads:
        """From GGUF keys; what is missing or no number counts as not said."""
        arch = metadata.get("general.architecture")
        n_layer = _whole(metadata.get(f"{arch}.block_count"))
        n_head = _by_layer(metadata.get(f"{arch}.attention.head_count"), n_layer)
        n_head_kv = _by_layer(metadata.get(f"{arch}.attention.head_count_kv"), n_layer)
        return cls(n_head, tuple(kv or q for q, kv in zip(n_head, n_head_kv, strict=True)))

    def counts(self, layer: int | None) -> tuple[int, int]:
        """(query heads, KV heads) of a layer; zeros where not known."""
        if layer is None or not 0 <= layer < len(self.n_head):
            return 0, 0
        return self.n_head[layer], self.n_head_kv[layer]

    def of_tensor(self, layer: int | None, klass: str) -> int:
        """Heads of the rows of attn_q, attn_k or attn_v, or of the columns of attn_output; 0 for other tensors."""
        n_head, n_head_kv = self.counts(layer)
        part = klass.split(".")[0]
        return {"attn_q": n_head, "attn_output": n_head, "attn_k": n_head_kv, "attn_v": n_head_kv}.get(part, 0)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 4096 else 0


def _by_layer(value: Any, n_layer: int) -> tuple[int, ...]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * n_layer
    return tuple(_whole(v) for v in [*values, *[0] * n_layer][:n_layer])
