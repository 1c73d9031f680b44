"""Every op's kernel by its ggml_op_desc, collected from the modules that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from diffharness.replay.call import Kernel

# Each exports `KERNELS: dict[str, Kernel]`.
MODULES = (
    "attention",
    "convolution",
    "elementwise",
    "glu",
    "hyper",
    "images",
    "indexer",
    "matmul",
    "norms",
    "recurrent",
    "rope",
    "rwkv",
    "selection",
    "shapes",
)


def collect(modules: Mapping[str, Mapping[str, Kernel]]) -> Mapping[str, Kernel]:
    """One table of all; ValueError where two modules claim an op."""
    found: dict[str, Kernel] = {}
    owner: dict[str, str] = {}
    for module, kernels in modules.items():
        for op, kernel in kernels.items():
            if op in found:
                raise ValueError(f"{op} has kernels in {owner[op]} and in {module}")
            found[op], owner[op] = kernel, module
    return MappingProxyType(found)


KERNELS: Mapping[str, Kernel] = collect({name: import_module(f"{__package__}.{name}").KERNELS for name in MODULES})
