"""Layouts as machine code for the processor at hand: compiled in memory in milliseconds, nothing is kept on disk."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numpy.typing import NDArray

from diffharness.weights.room import LINE
from diffharness.weights.unpack import Unpack
from diffharness.weights.unpack.simple import Layout
from diffharness.weights.unpack.vector import I8, I64, Block

_LOCK = Lock()


@dataclass(frozen=True)
class Processor:
    """What code is made for, in LLVM's words."""

    cpu: str
    features: str


@cache
def this_processor() -> Processor:
    return Processor(binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())


def compiled(
    layout: Layout, block_size: int, type_size: int, processor: Processor | None = None, *, streamed: bool = False
) -> Unpack:
    """A function that unpacks blocks of `type_size` bytes to `block_size` values. It lets other threads run meanwhile.

    Both of its arguments must be contiguous, of as many blocks each; ValueError if not. With `streamed`, for more
    values than the caches hold, the values are written past these: lines that are overwritten as a whole are not
    fetched before, and what others work with stays in the caches. They must begin with a line then.
    """
    with _LOCK:
        engine = _engine(str(_module(layout, block_size, type_size, streamed)), processor or this_processor())
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
            engine.get_function_address("unpack")
        )

    def unpack(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        n = len(blocks)
        if blocks.shape != (n, type_size) or out.shape != (n, block_size) or out.dtype != np.float32:
            raise ValueError(
                f"expected [{n}, {type_size}] and float32 [{n}, {block_size}], got {blocks.shape}, {out.shape}"
            )
        if blocks.dtype != np.uint8 or not blocks.flags.c_contiguous or not out.flags.carray:
            raise ValueError("blocks must be contiguous bytes, values contiguous and writeable")
        if streamed and out.ctypes.data % LINE:
            raise ValueError(f"values to be streamed must begin at a multiple of {LINE} bytes")
        call(blocks.ctypes.data, out.ctypes.data, n)

    unpack.__dict__["engine"] = engine  # the code lives as long as this does
    return unpack


def _module(layout: Layout, block_size: int, type_size: int, streamed: bool) -> Any:
    """LLVM's code of `void unpack(const char *stored, float *values, int64 n_blocks)`."""
    module = ir.Module()
    pointer = ir.PointerType()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer, pointer, I64]), "unpack")
    stored, values, n = function.args
    for argument in (stored, values):
        argument.add_attribute("noalias")
    start, loop, end = (function.append_basic_block(name) for name in ("start", "loop", "end"))
    code = ir.IRBuilder(start)
    code.cbranch(code.icmp_signed(">", n, I64(0)), loop, end)
    code.position_at_end(loop)
    i = code.phi(I64)
    i.add_incoming(I64(0), start)
    here, there = (
        code.gep(base, [code.mul(i, I64(step))], source_etype=I8)
        for base, step in ((stored, type_size), (values, 4 * block_size))
    )
    layout(Block(code, here, there, streamed=streamed))
    following = code.add(i, I64(1))
    i.add_incoming(following, loop)
    code.cbranch(code.icmp_signed("<", following, n), loop, end)
    code.position_at_end(end)
    if streamed:
        code.fence("seq_cst")  # such writes keep no order with others: all are done before the caller goes on
    code.ret_void()
    return module


def _engine(source: str, processor: Processor) -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=processor.cpu, features=processor.features, opt=3)
    module = binding.parse_assembly(source)
    module.verify()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine
