"""The worker's jobs that quantize: whole files, and rows in shared memory, request after request.

Standard library, numpy and llama_cpp only.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from diffharness.engine.session import Job, Session
from diffharness.errors import DiffharnessError, EngineError


def quantize_file(session: Session, job: Job) -> dict[str, Any]:
    """llama_model_quantize: a file to a mixture (`Q4_K_M`), or each tensor to the type that it is given."""
    llama = session.llama
    ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{job['ftype']}", None)
    if ftype is None:
        raise EngineError(f"this llama.cpp has no quantization {job['ftype']}")
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = job["threads"], ftype, True
    types = job["types"]
    if types:
        array = (llama.llama_model_tensor_override * (len(types) + 1))()
        for item, (pattern, name) in zip(array, types.items(), strict=False):
            item.pattern, item.type = pattern.encode(), session.ggml.type_id(name, llama)
        params.tt_overrides, params.pure = array, True
    uniform = job["uniform"]
    if uniform:
        # Types that llama.cpp refuses to make without an importance matrix get one that prefers nothing.
        ones = np.ones(max(uniform.values()), dtype=np.float32)
        weights = (llama.llama_model_imatrix_data * (len(uniform) + 1))()
        for item, (name, size) in zip(weights, uniform.items(), strict=False):
            item.name, item.size = name.encode(), size
            item.data = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = weights
    session.phase("quantize")
    status = llama.llama_model_quantize(os.fsencode(job["model"]), os.fsencode(job["out"]), ctypes.byref(params))
    if status != 0:
        raise EngineError(f"llama.cpp does not quantize {job['model']}: {status}")
    return {}


def serve_quantizer(session: Session, job: Job) -> dict[str, Any]:
    """Requests on standard input, a line each, until it ends: rows in shared memory to blocks behind them.

    The memory grows with the requests, which say where in it rows, importance and blocks lie. What ggml refuses is
    answered by a `refused` event, and the next request is waited for.
    """
    session.phase("quantize")
    memory = np.empty(0, dtype=np.uint8)
    with ThreadPoolExecutor(job["threads"]) as pool:
        for line in sys.stdin:
            request = json.loads(line)
            if memory.size < request["size"]:
                memory = np.frombuffer(mmap.mmap(job["memory"], request["size"]), dtype=np.uint8)
            try:
                _answer(session, memory, request, job["threads"], pool)
            except DiffharnessError as err:
                session.send("refused", kind=type(err).__name__, message=err.message, hint=err.hint)
            else:
                session.send("answer")
    return {}


def _answer(session: Session, memory: Any, request: Job, threads: int, pool: ThreadPoolExecutor) -> None:
    n, width, ggml = request["n_rows"], request["width"], session.ggml
    type_id = ggml.type_id(request["type"], session.llama)
    rows = memory[: 4 * n * width].view(np.float32).reshape(n, width)
    importance = None
    if request["importance"] is not None:
        importance = memory[request["importance"] :][: 4 * width].view(np.float32)
    bounds = [n * i // threads for i in range(threads + 1)]

    def part(first: int, last: int) -> Any:
        return ggml.quantize(rows[first:last], type_id, importance)

    at = request["out"]
    for blocks in pool.map(part, bounds[:-1], bounds[1:]):
        memory[at : at + blocks.size] = blocks
        at += blocks.size
