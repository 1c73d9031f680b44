"""How much memory a forward takes at the least, told by shapes before anything is read.

Counted is what is in memory together without doubt: the residual streams of all tokens; beside them either a layer's
largest matrix and what it makes, or the logits. A forward takes more than that (the next tensor is read ahead,
attention has scores), so what is refused here would have failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffharness import taps
from diffharness.errors import UnsupportedError
from diffharness.machine import available_memory
from diffharness.reference.runner import batches
from diffharness.weights.room import gigabytes
from diffharness.weights.source import EMBEDDING, IntArray, TensorInfo, WeightSource

_BY_ROWS = frozenset({EMBEDDING, "output.weight", "per_layer_token_embd.weight"})  # never whole in memory


@dataclass(frozen=True)
class Need:
    """Bytes, by what they are for."""

    streams: int  # the residual streams of all tokens
    weights: int  # the largest matrix; all of a layer's where several groups of chunks go through it
    values: int  # of the widest product of a layer
    logits: int
    heaviest: str  # where the weights are: a tensor, or a layer

    @property
    def total(self) -> int:
        return self.streams + max(self.weights + self.values, self.logits)


def need(source: WeightSource, chunks: Sequence[IntArray], *, keep_logits: bool = True) -> Need:
    """Of a forward of these chunks in float32, from the shapes of the source's tensors."""
    groups = [len(batch) * len(batch[0]) for _, batch in batches(chunks, streams=1)]
    n_vocab, n_embd = source.tensors[EMBEDDING].shape
    pieces = {info.name: _piece(info) for info in source.tensors.values() if info.name not in _BY_ROWS}
    if len(groups) > 1:
        pieces = _by_layer(pieces)
    heaviest = max(pieces, key=pieces.__getitem__, default=EMBEDDING)
    widths = [info.shape[0] for info in source.tensors.values() if len(info.shape) == 2 and info.name not in _BY_ROWS]
    n_tokens = sum(groups)
    return Need(
        streams=4 * n_tokens * n_embd,
        weights=4 * pieces.get(heaviest, 0),
        values=4 * max(groups, default=0) * max(widths, default=0),
        logits=4 * n_tokens * n_vocab if keep_logits else 0,
        heaviest=heaviest,
    )


def require(source: WeightSource, chunks: Sequence[IntArray], *, keep_logits: bool = True) -> None:
    """Raises UnsupportedError if a forward of these chunks needs more memory than there is."""
    there, needed = available_memory(), need(source, chunks, keep_logits=keep_logits)
    if there is None or needed.total <= there:
        return
    n_tokens = sum(map(len, chunks))
    at_head = needed.logits > needed.weights + needed.values
    parts = [f"{gigabytes(needed.streams)} for {n_tokens} tokens between layers"]
    if at_head:
        parts.append(f"{gigabytes(needed.logits)} for their logits")
    else:
        parts.append(f"{gigabytes(needed.weights)} for {needed.heaviest} as float32")
        parts.append(f"{gigabytes(needed.values)} for what is computed with it")
    by_tokens = needed.total - (0 if at_head else needed.weights)
    fewer = "give fewer tokens (--tokens), or " if by_tokens > needed.total / 2 else ""
    raise UnsupportedError(
        f"{source.label}: the reference needs at least {gigabytes(needed.total)} of memory ({', '.join(parts)}), "
        f"and {gigabytes(there)} are available",
        hint=f"{fewer}use a machine with more memory",
        tensor=needed.heaviest if needed.heaviest in source.tensors else None,
    )


def _piece(info: TensorInfo) -> int:
    """Elements that are in memory at once: of a stack of experts one."""
    return info.n_elements // (info.shape[0] if len(info.shape) == 3 else 1)


def _by_layer(pieces: Mapping[str, int]) -> dict[str, int]:
    """Elements of each layer's pieces together, and of each that belongs to none."""
    found: dict[str, int] = {}
    for name, n in pieces.items():
        layer, _ = taps.split(name)
        key = name if layer is None else f"layer {layer}"
        found[key] = found.get(key, 0) + n
    return found
