"""llama.cpp as the worker sees it: the bindings' low-level API, and ggml's tensors behind it.

The bindings declare llama.h; what is missing for reading graph nodes is added here: a ctypes mirror
of `ggml_tensor` (ggml.h) and a few functions of libggml-base. Both are checked against the library
before they are trusted, because an engine may be another build than the bindings were written for.
Which library that is, `loading` finds out.
Standard library, numpy and llama_cpp only.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.errors import EngineError

MAX_DIMS = 4
MAX_SRC = 10
MAX_OP_PARAMS = 64
MAX_NAME = 64
_OBJECT_SIZE = 32  # ggml_tensor_overhead() counts the allocator's ggml_object too
HINT = "use an engine whose llama-cpp-python and libraries belong together"


class GgmlTensor(ctypes.Structure):
    """Mirror of `struct ggml_tensor` (ggml.h); pointers are plain addresses, null is None."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * MAX_DIMS),
        ("nb", ctypes.c_size_t * MAX_DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * (MAX_OP_PARAMS // 4)),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * MAX_NAME),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


_P, _I, _I64, _SIZE, _STR = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p
# function of libggml-base: (result, arguments); from ggml.h and ggml-backend.h
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_version": (_STR, []),
    "ggml_commit": (_STR, []),
    "ggml_nbytes": (_SIZE, [_P]),
    "ggml_op_name": (_STR, [_I]),
    "ggml_op_desc": (_STR, [_P]),
    "ggml_type_name": (_STR, [_I]),
    "ggml_blck_size": (_I64, [_I]),
    "ggml_row_size": (_SIZE, [_I, _I64]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_backend_buffer_is_host": (ctypes.c_bool, [_P]),
    "ggml_backend_buffer_get_usage": (_I, [_P]),
    "ggml_backend_tensor_get": (None, [_P, _P, _SIZE, _SIZE]),
    "ggml_quantize_chunk": (_SIZE, [_I, _P, _P, _I64, _I64, _I64, _P]),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [_I]),
    "ggml_init": (_P, [_InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_new_tensor_2d": (_P, [_P, _I, _I64, _I64]),
    "ggml_set_name": (_P, [_P, _STR]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
}

# Types whose numbers (ggml.h; they never change) the bindings leave out.
_UNNAMED_TYPES = {"BF16": 30, "TQ1_0": 34, "TQ2_0": 35}
_FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


@dataclass(frozen=True)
class Node:
    """What a graph node is; its values stay where they are."""

    address: int
    name: str
    op: str  # ggml_op_name: MUL_MAT, ADD, ROPE, GLU, ...
    sources: tuple[str, ...]  # names of src[], in order
    rows: int  # ne[1]


def _name(tensor: GgmlTensor) -> str:
    raw: bytes = tensor.name
    return raw.decode("utf-8", "replace")


class Ggml:
    """The functions of libggml-base that describe and read tensors, and quantize rows."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises EngineError if the library lacks a function or lays tensors out in another way."""
        self.library: Any = library
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                raise EngineError(f"{library._name} has no function {name}", hint=HINT)
            function.restype, function.argtypes = result, arguments
        self._ops: dict[int, str] = {}
        self._check_layout()

    def node(self, address: int) -> Node:
        tensor = GgmlTensor.from_address(address)
        op = self._ops.get(tensor.op)
        if op is None:
            op = self._ops[tensor.op] = self.library.ggml_op_name(tensor.op).decode()
        sources = tuple(_name(GgmlTensor.from_address(source)) for source in tensor.src if source)
        return Node(address, _name(tensor), op, sources, tensor.ne[1])

    def describe(self, node: Node) -> dict[str, Any]:
        """Name, op (of unary and gated nodes the function: GELU, SWIGLU), shapes and types, for reports."""
        tensor = GgmlTensor.from_address(node.address)
        sources = [GgmlTensor.from_address(source) for source in tensor.src if source]
        return {
            "node": node.name,
            "op": self.library.ggml_op_desc(node.address).decode(),
            "type": self.type_name(tensor.type),
            "shape": list(tensor.ne),
            "sources": [
                {"name": name, "type": self.type_name(source.type), "shape": list(source.ne)}
                for name, source in zip(node.sources, sources, strict=True)
            ],
        }

    def type_name(self, type_id: int) -> str:
        """`F32`, `Q4_K`, ...; `type_id` must come from the library or from `type_id`."""
        raw: bytes | None = self.library.ggml_type_name(type_id)
        return raw.decode().upper() if raw else str(type_id)

    def type_id(self, name: str, llama: Any) -> int:
        """The id of a type by its name; EngineError if bindings and library do not agree on one."""
        name = name.upper()
        type_id = getattr(llama, f"GGML_TYPE_{name}", _UNNAMED_TYPES.get(name))
        if type_id is None or self.type_name(type_id) != name:
            raise EngineError(f"this llama.cpp has no tensor type {name}")
        return int(type_id)

    def values(self, address: int, n_rows: int, *, streams: bool = False) -> NDArray[Any]:
        """A float node's values as [n_rows, width], tokens outermost, heads or experts joined.

        Where the node lies in this process's memory it is not copied: use it before the graph goes on. With `streams`
        the node's outermost axis are streams of all tokens, which are joined too.
        """
        tensor = GgmlTensor.from_address(address)
        dtype = _FLOATS.get(self.type_name(tensor.type))
        if dtype is None:
            raise EngineError(f"node {tensor.name.decode()} holds {self.type_name(tensor.type)}, not floats")
        raw = self._bytes(address, tensor)
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        if raw.size == np.prod(shape) * dtype.itemsize and strides[-1] == dtype.itemsize:
            flat: NDArray[Any] = raw.view(dtype)
        else:  # a view with gaps or permuted axes
            flat = np.lib.stride_tricks.as_strided(raw[: dtype.itemsize].view(dtype), shape, strides).reshape(-1)
        if streams:
            return flat.reshape(tensor.ne[2], n_rows, -1).swapaxes(0, 1).reshape(n_rows, -1)
        return flat.reshape(n_rows, -1)

    def _bytes(self, address: int, tensor: GgmlTensor) -> NDArray[np.uint8]:
        n_bytes = self.library.ggml_nbytes(address)
        if self.is_on_host(address):
            return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(tensor.data))
        raw = np.empty(n_bytes, dtype=np.uint8)
        self.library.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.size)
        return raw

    def is_on_host(self, address: int) -> bool:
        """Whether a tensor lies in this process's memory."""
        tensor = GgmlTensor.from_address(address)
        owner = GgmlTensor.from_address(tensor.view_src) if tensor.view_src else tensor
        return bool(owner.buffer and tensor.data and self.library.ggml_backend_buffer_is_host(owner.buffer))

    def copy_bytes(self, address: int, memory: NDArray[np.uint8]) -> None:
        """A tensor's bytes, from its first to its last, gaps of a view included, into `memory` of that size."""
        if self.is_on_host(address):
            ctypes.memmove(memory.ctypes.data, GgmlTensor.from_address(address).data, memory.size)
        else:
            self.library.ggml_backend_tensor_get(address, memory.ctypes.data, 0, memory.size)

    def quantize(
        self, rows: NDArray[np.float32], type_id: int, importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Rows [n, n_per_row] in the blocks of a type, as ggml does it; `importance` [n_per_row] weighs the columns."""
        n_rows, n_per_row = rows.shape
        if importance is None and self.library.ggml_quantize_requires_imatrix(type_id):
            raise EngineError(f"{self.type_name(type_id)} cannot be made without an importance matrix")
        if n_per_row % self.library.ggml_blck_size(type_id):
            raise EngineError(f"rows of {n_per_row} do not divide into blocks of {self.type_name(type_id)}")
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        out = np.empty(n_rows * self.library.ggml_row_size(type_id, n_per_row), dtype=np.uint8)
        weights = None if importance is None else importance.ctypes.data
        done = self.library.ggml_quantize_chunk(
            type_id, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_per_row, weights
        )
        if done != out.size:
            raise EngineError(f"quantizing to {self.type_name(type_id)} gave {done} bytes, not {out.size}")
        return out

    def _check_layout(self) -> None:
        """Make two tensors and their product, and find in the mirror what was put in."""
        lib = self.library
        size = lib.ggml_tensor_overhead() - _OBJECT_SIZE
        if size != ctypes.sizeof(GgmlTensor):
            raise EngineError(f"ggml_tensor takes {size} bytes here, {ctypes.sizeof(GgmlTensor)} expected", hint=HINT)
        context = lib.ggml_init(_InitParams(16 * lib.ggml_tensor_overhead(), None, True))
        try:
            a = lib.ggml_set_name(lib.ggml_new_tensor_2d(context, 0, 3, 5), b"probe-a")
            b = lib.ggml_new_tensor_2d(context, 0, 3, 7)
            c = lib.ggml_set_name(lib.ggml_mul_mat(context, a, b), b"probe-c")
            left, product = GgmlTensor.from_address(a), GgmlTensor.from_address(c)
            found = (left.name, *left.ne, *left.nb, left.op, product.name, *product.ne, *product.src[:3])
            expected = (b"probe-a", 3, 5, 1, 1, 4, 12, 60, 60, 0, b"probe-c", 5, 7, 1, 1, a, b, None)
            if found != expected or self.node(c).op != "MUL_MAT" or self.type_name(product.type) != "F32":
                raise EngineError("ggml_tensor's fields are not where they are expected", hint=HINT)
        finally:
            lib.ggml_free(context)
