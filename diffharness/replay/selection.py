"""Sorting and choosing: results that are indices.

Among equal values ggml's order is that of std::sort and std::partial_sort, which is nobody's definition, and TOP_K
gives its indices in no particular order; `replay.choices` says when two such results agree.
"""

from __future__ import annotations

from torch import Tensor

from diffharness.replay.call import Call, Kernel

_DESCENDING = 1  # GGML_SORT_ORDER_DESC


def _argsort(call: Call) -> Tensor:
    """Indices [.., ne0] that sort each row; equal values in the order in which they stand."""
    return call.x(0).argsort(dim=-1, descending=call.i(0) == _DESCENDING, stable=True)


def _top_k(call: Call) -> Tensor:
    """Indices of the greatest values of each row, as many as the node's rows hold."""
    return call.x(0).argsort(dim=-1, descending=True, stable=True)[..., : call.node.out.shape[-1]]


def _argmax(call: Call) -> Tensor:
    """Index of each row's greatest value, of the last one among equals; [ne1]."""
    x = call.x(0)[0, 0]
    return x.shape[-1] - 1 - x.flip(-1).argmax(-1)


KERNELS: dict[str, Kernel] = {"ARGSORT": _argsort, "TOP_K": _top_k, "ARGMAX": _argmax}
