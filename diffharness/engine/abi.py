"""Whether the bindings' structures are those of the library that they loaded.

The library may be another build than the bindings were written for, and a structure passed by value in
another layout is read as nonsense or overwrites memory. llama.cpp's default parameters are the probe:
each structure is had from its `..._default_params` function in a room larger than any, its size is seen
from what the function writes (x86-64, where the room is handed over like an argument), and every field
must hold one of the defaults that it ever had. Standard library only.

What cannot be seen: two neighbours of one type and one default exchanged, and a flag added in a gap.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from typing import Any

from diffharness.errors import EngineError

HINT = (
    "build the bindings for these libraries, and give that interpreter to --engine; "
    "or libraries of the llama.cpp that these bindings were made for"
)
_ROOM = 1024  # bytes beyond the mirror: llama_context_params has grown by 40 in a year
_FILLS = (0x5A, 0xA5)  # a byte that is either after both calls was written by neither
_ALIGNMENT = 8
_POINTERS = (ctypes._Pointer, ctypes._CFuncPtr)  # type: ignore[attr-defined]

Known = Mapping[str, tuple[Any, ...]]

# llama.h's defaults since 2024. A field that is not here is not checked; pointers must be null.
CONTEXT: Known = {
    "n_ctx": (512,), "n_batch": (2048,), "n_ubatch": (512,), "n_seq_max": (1,), "n_rs_seq": (0,), "n_outputs_max": (0,),
    "n_threads": (4,), "n_threads_batch": (4,), "ctx_type": (0,), "rope_scaling_type": (-1,), "pooling_type": (-1,),
    "attention_type": (-1,), "flash_attn_type": (-1,), "rope_freq_base": (0.0,), "rope_freq_scale": (0.0,),
    "yarn_ext_factor": (-1.0,), "yarn_attn_factor": (-1.0, 1.0), "yarn_beta_fast": (-1.0, 32.0),
    "yarn_beta_slow": (-1.0, 1.0), "yarn_orig_ctx": (0,), "defrag_thold": (-1.0,), "type_k": (1,), "type_v": (1,),
    "embeddings": (False,), "offload_kqv": (True,), "flash_attn": (False,), "no_perf": (True,), "op_offload": (True,),
    "swa_full": (True,), "kv_unified": (False,), "n_samplers": (0,),
}  # fmt: skip
MODEL: Known = {
    "n_gpu_layers": (-1, 0, 999), "split_mode": (1,), "load_mode": (-1, 0, 1), "lazy_mode": (-1, 0, 1),
    "main_gpu": (0,), "vocab_only": (False,), "use_mmap": (True,), "use_mlock": (False,), "check_tensors": (False,),
    "use_extra_bufts": (True,), "no_host": (False,), "no_alloc": (False,), "load_mtp": (False,),
}  # fmt: skip
QUANTIZE: Known = {
    "nthread": (0,), "allow_requantize": (False,), "quantize_output_tensor": (True,), "only_copy": (False,),
    "pure": (False,), "keep_split": (False,), "dry_run": (False,),
}  # fmt: skip
# The functions that give a structure by value, and what is known of it.
PROBES: Mapping[str, tuple[str, Known]] = {
    "llama_context_default_params": ("llama_context_params", CONTEXT),
    "llama_model_default_params": ("llama_model_params", MODEL),
    "llama_model_quantize_default_params": ("llama_model_quantize_params", QUANTIZE),
}


def check_structures(llama: Any) -> None:
    """EngineError unless the structures that `llama` (the module llama_cpp.llama_cpp) declares are the library's."""
    for function, (structure, known) in PROBES.items():
        mirror = getattr(llama, structure)
        raw = probe(llama._lib[function], ctypes.sizeof(mirror))
        problem = misfit(mirror, known, *raw)
        if problem:
            raise EngineError(f"{llama._lib._name} does not fit these bindings: {structure} {problem}", hint=HINT)
    _check_batch(llama)


def probe(function: Any, size: int) -> tuple[bytes, frozenset[int] | None]:
    """What a function without arguments returns by value, in room for more than `size` bytes, and which were written.

    None for the latter where the processor's calling convention does not let it be seen.
    """
    room = size + _ROOM
    if platform.machine().lower() not in ("x86_64", "amd64"):

        class Roomy(ctypes.Structure):
            _fields_ = [("bytes", ctypes.c_uint8 * room)]

        function.restype, function.argtypes = Roomy, []
        return bytes(function()), None
    results = []
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    for fill in _FILLS:
        memory = ctypes.create_string_buffer(bytes([fill]) * room, room)
        function(memory)
        results.append(memory.raw)
    first, second = results
    return first, frozenset(i for i in range(room) if first[i] == second[i])


def misfit(mirror: type[ctypes.Structure], known: Known, raw: bytes, written: frozenset[int] | None) -> str | None:
    """What says that `raw`, given by the library, is not a `mirror`; None if nothing does."""
    size = ctypes.sizeof(mirror)
    if written is not None:
        end = max(written, default=-1) + 1
        found = -(-end // _ALIGNMENT) * _ALIGNMENT
        if found != size:
            return f"takes {found} bytes there, and {size} here"
        for name, *_ in mirror._fields_:
            field = getattr(mirror, name)
            if not written.issuperset(range(field.offset, field.offset + field.size)):
                return f"has no {name} at byte {field.offset}"
    params = mirror.from_buffer_copy(raw[:size])
    for name, kind, *_ in mirror._fields_:
        value = _plain(getattr(params, name))
        allowed = known.get(name, (None,) if _is_pointer(kind) else (value,))
        if value not in allowed:
            return f"has {name} = {value} by default, {' or '.join(map(str, allowed))} expected"
    return None


def _is_pointer(kind: Any) -> bool:
    return kind is ctypes.c_void_p or issubclass(kind, _POINTERS)


def _plain(value: Any) -> Any:
    """A field's value; None of a null pointer or function, an address of another."""
    if isinstance(value, _POINTERS):
        return ctypes.cast(value, ctypes.c_void_p).value
    return value


def _check_batch(llama: Any) -> None:
    """A batch of three tokens must come back with its tokens, and with null where nothing was given."""

    class Roomy(ctypes.Structure):
        _fields_ = [("batch", llama.llama_batch), ("room", ctypes.c_uint8 * _ROOM)]

    tokens = (ctypes.c_int32 * 3)(1, 2, 3)
    function = llama._lib["llama_batch_get_one"]
    function.restype, function.argtypes = Roomy, [ctypes.c_void_p, ctypes.c_int32]
    batch = function(ctypes.addressof(tokens), 3).batch
    others = ("embd", "pos", "n_seq_id", "seq_id", "logits")
    fits = batch.n_tokens == 3 and _plain(batch.token) == ctypes.addressof(tokens)
    if not fits or any(_plain(getattr(batch, name)) for name in others):
        raise EngineError(
            f"{llama._lib._name} does not fit these bindings: llama_batch is laid out otherwise", hint=HINT
        )
