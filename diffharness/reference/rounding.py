"""What a native llama.cpp run rounds, done to the reference: products with a file's weights, and the KV cache.

Before a product with a quantized weight ggml's CPU backend rounds the activations to a type that suits the weight's
(`VEC_DOT_TYPE`: Q8_0, Q8_1, Q8_K, F16, BF16), and keys and values go through the cache's type. `RoundingWeights` gives
out matrices that know which type that is, and any product with one of them rounds its other side. So an architecture's
file stays the model's definition, and nothing of this exists unless it is asked for.

Simulated: the rounding before every product with a matrix of the file, those of experts and of the output head
included; the float16 sums of Q8_1's blocks, by which the minima of Q4_1 and Q5_1 are multiplied; keys (after rope) and
values as the cache holds them; queries, and attention weights, where they are rounded too (`KvCache`).
Not simulated: the order of sums; another processor's way to round (`activation_quant.ARITHMETICS`; repacked weights
and AMX round as x86 does); flash attention of fewer than 64 tokens at once, which rounds queries and sums in float16; a
cache of a quantized type, which llama.cpp may rotate first; products on a device other than the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffharness.reference.model import KvCache
from diffharness.reference.weights import SourceWeights
from diffharness.replay.activation_quant import MINIMA, VEC_DOT_TYPE, as_held, minima, rounded
from diffharness.weights.dequant import byte_size
from diffharness.weights.gguf_file import GgufFile

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset({F.linear, torch.mm})
_PARTS: frozenset[Callable[..., Any]] = frozenset({Tensor.__getitem__, Tensor.T.__get__})  # type: ignore[attr-defined]


class RoundingMatrix(Tensor):
    """A matrix [out, in] of the file, or some of a stack, whose products round the other side to the type `held`.

    With `minima` there are in / 32 more columns: what the codes of each block of a row are counted from.
    """

    held: str
    minima: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _PRODUCTS:
                x, w, *rest = args
                operand = as_held(x, w.held) if w.minima else rounded(x, w.held)
                return func(operand, w, *rest, **(kwargs or {}))
            result = func(*args, **(kwargs or {}))
            return _labelled(result, args[0].held, args[0].minima) if func in _PARTS else result


class RoundingWeights(SourceWeights):
    """A WeightSource whose matrices round what they are multiplied with; rows of an embedding are plain tensors."""

    def get(self, name: str) -> Tensor:
        return self._rounding(name, super().get(name), slice(None))

    def rows(self, name: str, rows: slice | Tensor) -> Tensor:
        values = super().rows(name, rows)
        return values if isinstance(rows, Tensor) else self._rounding(name, values, rows)

    def _rounding(self, name: str, values: Tensor, rows: slice) -> Tensor:
        info = self.source.tensors[name]
        held = VEC_DOT_TYPE.get(info.type, "F32")
        if held == "F32" or values.dim() < 2:
            return values
        if info.type not in MINIMA or not isinstance(self.source, GgufFile):
            return _labelled(values, held, minima=False)
        stored = self.source.raw(name).reshape(*info.shape[:-1], byte_size(info.type, info.shape[-1:]))
        return _labelled(torch.cat([values, minima(stored[rows], info.type).to(values)], dim=-1), held, minima=True)


def round_to(x: Tensor, type_name: str) -> Tensor:
    """x [..., n] as rows of `type_name` hold it, in x's own dtype."""
    return x if type_name == "F32" else rounded(x, type_name)


def through_cache(q: Tensor, k: Tensor, v: Tensor, cache: KvCache) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, T, H, D] as attention sees them."""
    if cache.rounds_queries:
        q = round_to(q, cache.type_k)
    return q, round_to(k, cache.type_k), round_to(v, cache.type_v)


def _labelled(matrix: Tensor, held: str, minima: bool) -> RoundingMatrix:
    made = matrix.as_subclass(RoundingMatrix)
    made.held, made.minima = held, minima
    return made
