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

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset({F.linear, torch.mm, torch.matmul})
_PARTS: frozenset[Callable[..., Any]] = frozenset(
    {Tensor.__getitem__, Tensor.unflatten, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
)


class RoundingMatrix(Tensor):
    """A matrix [out, in] of the file, or some of a stack, whose products round the other side to the type `held`.

    With `minima` there are in / 32 more columns: what the codes of each block of a row are counted from. Whatever is
    neither a product nor a part of the matrix does not see them, and gives a plain tensor.
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
            if func is Tensor.unbind:  # what iterating over a stack asks for
                return [_labelled(part, args[0].held, args[0].minima) for part in args[0].unbind()]
            if func is Tensor.reshape:
                return _reshaped(args[0], _plain(args[0]).reshape(*args[1:]))
            if func in _PARTS:
                return _labelled(func(*args, **(kwargs or {})), args[0].held, args[0].minima)
            return func(*map(_plain, args), **(kwargs or {}))


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


def _reshaped(matrix: RoundingMatrix, wanted: Tensor) -> Tensor:
    """The matrix in the shape that is wanted; plain where that has other rows."""
    if wanted.shape[-1] != _plain(matrix).shape[-1]:
        return wanted
    return _labelled(matrix.reshape(*wanted.shape[:-1], matrix.shape[-1]), matrix.held, matrix.minima)


def _plain(x: Any) -> Any:
    """An argument without the columns of minima, where it is or holds a matrix that has some."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(_plain, x))
    if not isinstance(x, RoundingMatrix) or not x.minima:
        return x
    return x.as_subclass(Tensor)[..., : x.shape[-1] * 32 // 33]


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
