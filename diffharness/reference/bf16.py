"""A forward whose products are made in bfloat16: faster where the processor knows it, and coarser. For grading only.

Both sides of every product of activations with a matrix of a layer are rounded to bfloat16. Sums are made in float32,
as torch's kernels make them, and each result is rounded to bfloat16 before it is float32 again. All else is in float32:
norms, activations, attention between queries, keys and values, recurrent states; the routers of experts, whose inputs
are noisy enough to choose others now and then; and the output head, where the rounding of the results alone would be
most of the error (of the mean KL three quarters, measured on SmolLM2 135M and Gemma 3 270M).

What this costs is to be measured beside the forward in float32, on the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffharness.reference.runner import OnTap, Reference
from diffharness.reference.weights import SourceWeights
from diffharness.weights.source import IntArray, WeightSource

_BLOCK_ELEMENTS = 8 << 20  # of a matrix that are in bfloat16 at once, 16 MiB
_ROUTER = "ffn_gate_inp"  # in the names of what chooses experts
_HEAD = frozenset({"output.weight", "token_embd.weight"})

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {torch.mm, torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}
)
_PARTS: frozenset[Callable[..., Any]] = frozenset(
    {Tensor.__getitem__, Tensor.unflatten, Tensor.reshape, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
)


class Bf16Matrix(Tensor):
    """A matrix [out, in], or a stack of them, held in float32, whose products are made in bfloat16.

    Its parts are such matrices too; whatever else is made of it is a plain tensor of the values as they are.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                return _linear(*args, **(kwargs or {}))
            if func in _PRODUCTS:
                x, w = args
                return torch.matmul(x.to(torch.bfloat16), w.to(torch.bfloat16)).to(x.dtype)
            found = func(*args, **(kwargs or {}))
            if func is Tensor.unbind:  # what iterating over a stack asks for
                return [part.as_subclass(cls) for part in found]
            return found.as_subclass(cls) if func in _PARTS else found


class Bf16Weights(SourceWeights):
    """A WeightSource whose matrices multiply in bfloat16; vectors, embeddings, head and routers are plain tensors."""

    def get(self, name: str) -> Tensor:
        return _multiplying(name, super().get(name))

    def rows(self, name: str, rows: slice | Tensor) -> Tensor:
        values = super().rows(name, rows)
        return values if isinstance(rows, Tensor) else _multiplying(name, values)


class Bf16Forward:
    """One model's forward as it is defined, its products in bfloat16. Errors as of `Reference`.

    It takes no input of an engine, has no teacher-forced stream and no conventions: nothing here can be held against
    an engine's numbers.
    """

    def __init__(self, source: WeightSource, *, device: str = "cpu") -> None:
        self._reference = Reference(source, device=device)
        self._reference.weights = Bf16Weights(source, device=self._reference.weights.device)

    def run(
        self,
        chunks: Sequence[IntArray],
        *,
        on_tap: OnTap | None = None,
        taps: Sequence[str] | None = None,
        keep_logits: bool = True,
    ) -> Tensor | None:
        """As `Reference.run` has it."""
        return self._reference.run(chunks, on_tap=on_tap, taps=taps, keep_logits=keep_logits)


def _multiplying(name: str, values: Tensor) -> Tensor:
    exact = values.dim() < 2 or name in _HEAD or _ROUTER in name
    return values if exact else values.as_subclass(Bf16Matrix)


def _linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x[..., in] times w[out, in] transposed, plus b[out]; only some of the matrix is in bfloat16 as well at a time."""
    step = max(1, _BLOCK_ELEMENTS // w.shape[-1])
    rounded = x.to(torch.bfloat16)
    blocks = [F.linear(rounded, w[at : at + step].to(torch.bfloat16)).to(x.dtype) for at in range(0, w.shape[0], step)]
    y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
    return y if b is None else y.add_(b)
