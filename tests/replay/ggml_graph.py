"""One op computed by ggml itself, recorded as the worker records it: the oracle of single kernels.

Tensors live in a ggml context of this process; the graph holds the op and what leads to it (views, mostly).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.engine.bindings import _FLOATS, _UNNAMED_TYPES, GgmlTensor, _InitParams
from diffharness.engine.loading import load_ggml, load_llama, loaded_libraries
from diffharness.recorded import Path, RecordedNode, Value

MEMORY = 64 << 20
_P = ctypes.c_void_p


@cache
def _libraries() -> tuple[Any, Any]:
    llama = load_llama()
    llama.llama_backend_init()
    ggml = load_ggml(llama)
    cpu: Any = ctypes.CDLL(str(loaded_libraries("libggml-cpu")[0]))
    cpu.ggml_cpu_init()
    cpu.ggml_graph_compute_with_ctx.argtypes = [_P, _P, ctypes.c_int]
    ggml.library.ggml_new_graph.restype, ggml.library.ggml_new_graph.argtypes = _P, [_P]
    ggml.library.ggml_build_forward_expand.argtypes = [_P, _P]
    ggml.library.ggml_build_forward_expand.restype = None
    new = ggml.library.ggml_new_tensor_4d
    new.restype, new.argtypes = _P, [_P, ctypes.c_int] + [ctypes.c_int64] * 4
    return ggml, cpu


def _argument(value: Any) -> Any:
    if isinstance(value, float):
        return ctypes.c_float(value)
    return _P(value) if value is None else ctypes.c_int64(value)  # an address, an int or a bool


class Graph:
    """A context to make tensors and ops in; `with graph() as g` frees it."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._ggml, self._cpu = _libraries()

    def tensor(self, values: NDArray[Any], type_name: str | None = None) -> int:
        """A tensor of the array's values and (reversed) shape; its type is the array's, or one to quantize it to."""
        known = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "int8": "I8", "int16": "I16"}
        type_name = type_name or known[str(np.asarray(values).dtype)]
        type_id = _UNNAMED_TYPES.get(type_name, None)
        if type_id is None:
            type_id = self._ggml.type_id(type_name, load_llama())
        shape = (1,) * (4 - values.ndim) + values.shape
        address: int = self._ggml.library.ggml_new_tensor_4d(self._context, type_id, *shape[::-1])
        if type_name in _FLOATS or values.dtype.kind == "i":
            raw = np.ascontiguousarray(values, _FLOATS.get(type_name, values.dtype))
        else:
            raw = self._ggml.quantize(np.ascontiguousarray(values, np.float32).reshape(-1, shape[-1]), type_id)
        ctypes.memmove(GgmlTensor.from_address(address).data, raw.ctypes.data, raw.nbytes)
        return address

    def __getattr__(self, name: str) -> Callable[..., int]:
        """`graph.mul_mat(a, b)` is ggml_mul_mat(context, a, b): floats go as float32, all else as it is."""
        function = getattr(self._ggml.library, f"ggml_{name}")
        function.restype, function.argtypes = _P, None
        return lambda *arguments: function(_P(self._context), *map(_argument, arguments))

    def amend(self, function: str, *arguments: Any) -> None:
        """`graph.amend("soft_max_add_sinks", node, sinks)`: a function of ggml.h that takes no context."""
        found = getattr(self._ggml.library, f"ggml_{function}")
        found.restype, found.argtypes = None, None
        found(*map(_argument, arguments))

    def run(self, address: int, n_threads: int = 1, path: Path = "batch") -> RecordedNode:
        """Compute the graph that ends in this tensor; the node, its sources as they were before."""
        tensor = GgmlTensor.from_address(address)
        lib = self._ggml.library
        inner = [s for s in tensor.src if s and GgmlTensor.from_address(s).op]
        for each in inner:  # what leads to the op, before its sources are read
            self._compute(each, n_threads)
        n_sources = max((i + 1 for i, source in enumerate(tensor.src) if source), default=0)
        sources = tuple(self._value(s) if s else None for s in tensor.src[:n_sources])
        self._compute(address, n_threads)
        op = lib.ggml_op_desc(address).decode()
        params = np.array(tensor.op_params, dtype=np.int32)
        return RecordedNode(0, op.lower(), op, params, self._value(address), sources, path)

    def _compute(self, address: int, n_threads: int) -> None:
        graph = self._ggml.library.ggml_new_graph(self._context)
        self._ggml.library.ggml_build_forward_expand(graph, address)
        assert self._cpu.ggml_graph_compute_with_ctx(self._context, graph, n_threads) == 0

    def _value(self, address: int) -> Value:
        tensor = GgmlTensor.from_address(address)
        n_bytes = self._ggml.library.ggml_nbytes(address)
        raw = np.frombuffer(ctypes.string_at(tensor.data, n_bytes), dtype=np.uint8)
        a, b, c, d = tuple(tensor.ne)[::-1]
        e, f, g, h = tuple(tensor.nb)[::-1]
        return Value(
            tensor.name.decode(), self._ggml.type_name(tensor.type), (a, b, c, d), (e, f, g, h), raw, tensor.view_offs
        )


@contextmanager
def graph() -> Iterator[Graph]:
    ggml, _ = _libraries()
    context = ggml.library.ggml_init(_InitParams(MEMORY, None, False))
    try:
        yield Graph(context)
    finally:
        ggml.library.ggml_free(context)
