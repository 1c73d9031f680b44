"""A worker's session with llama.cpp: the library, models and contexts made from a job's settings.

Settings that a version of the structures lacks are refused, not skipped: a run must not claim
settings that it did not have. Standard library, numpy and llama_cpp only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffharness.engine.bindings import Ggml
from diffharness.engine.capture import Heartbeat
from diffharness.engine.loading import load_ggml, load_llama
from diffharness.errors import EngineError

Job = Mapping[str, Any]

_FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
_ROPE = (
    "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow",
    "yarn_orig_ctx",
)  # fmt: skip
_OVERRIDE_TAGS = {"int": 0, "float": 1, "bool": 2, "str": 3}


class Session:
    """The library, the pipe to the parent, and the note of what is being done."""

    llama: Any  # the module llama_cpp.llama_cpp
    ggml: Ggml

    def __init__(self, event_fd: int, heartbeat_fd: int) -> None:
        self._events = os.fdopen(event_fd, "w", encoding="utf-8")
        self.heartbeat = Heartbeat(heartbeat_fd)

    def send(self, event: str, **fields: Any) -> None:
        """Tell the parent: `progress`, and last of all `result` or `error`."""
        self._events.write(json.dumps({"event": event, **fields}) + "\n")
        self._events.flush()

    def phase(self, name: str) -> None:
        self.heartbeat.beat(phase=name)

    def load_library(self) -> None:
        self.phase("import")
        self.llama = load_llama()
        self.ggml = load_ggml(self.llama)
        self.llama.llama_backend_init()

    def forget(self, context: Any) -> None:
        """Empty the context's cache, by the name that this version has for it."""
        llama = self.llama
        if hasattr(llama, "llama_memory_clear"):
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
        elif hasattr(llama, "llama_kv_self_clear"):  # until mid 2025
            llama.llama_kv_self_clear(context)
        else:
            llama.llama_kv_cache_clear(context)

    @contextmanager
    def model(self, job: Job, *, vocab_only: bool = False) -> Iterator[Any]:
        """The loaded model; a refusal is an EngineError, whose reason is in the engine's own words."""
        llama, settings = self.llama, job.get("settings", {})
        params = llama.llama_model_default_params()
        params.vocab_only = vocab_only
        if settings:
            params.n_gpu_layers = settings["n_gpu_layers"]
            _set(params, "use_extra_bufts", settings["extra_bufts"], without=True)
            if not settings["use_mmap"]:
                _set_mmap_off(params)
        overrides = _overrides(llama, job.get("overrides", []))
        if overrides is not None:
            params.kv_overrides = overrides
        self.phase("load")
        model = llama.llama_model_load_from_file(os.fsencode(job["model"]), params)
        if not model:
            raise EngineError(f"llama.cpp does not load {job['model']}")
        try:
            yield model
        finally:
            llama.llama_model_free(model)

    @contextmanager
    def context(self, job: Job, model: Any, n_ctx: int, callback: Any) -> Iterator[Any]:
        """A context of `n_ctx` tokens with the job's settings; `callback` is the graph's, or None."""
        llama, settings = self.llama, job["settings"]
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = min(settings["n_batch"], n_ctx)
        params.n_ubatch = min(settings["n_ubatch"], params.n_batch)
        params.n_threads = params.n_threads_batch = settings["threads"]
        params.type_k = self.ggml.type_id(settings["type_k"], llama)
        params.type_v = self.ggml.type_id(settings["type_v"], llama)
        _set_flash_attn(params, settings["flash_attn"])
        _set(params, "swa_full", settings["swa_full"], without=settings["swa_full"])  # changes memory, not values
        _set(params, "op_offload", settings["op_offload"], without=True)
        params.n_seq_max = settings["n_seq_max"]
        alone = settings["n_seq_max"] == 1  # then both layouts of the cache are one
        _set(params, "kv_unified", settings["kv_unified"], without=settings["kv_unified"] if alone else True)
        for name in _ROPE:
            if settings[name] is not None:
                setattr(params, name, settings[name])
        if callback is not None:
            params.cb_eval = callback
        context = llama.llama_init_from_model(model, params)
        if not context:
            raise EngineError(f"llama.cpp makes no context of {n_ctx} tokens for {job['model']}")
        try:
            yield context
        finally:
            llama.llama_free(context)


def _set(params: Any, name: str, value: Any, *, without: Any) -> None:
    """Set a field that older versions lack; what they do without it is `without`, anything else is refused."""
    if any(field[0] == name for field in params._fields_):
        setattr(params, name, value)
    elif value != without:
        raise EngineError(f"this llama.cpp has no setting {name}", hint=f"with it, only {name}={without} can be run")


def _set_flash_attn(params: Any, wanted: str) -> None:
    if any(field[0] == "flash_attn" for field in params._fields_):  # until September 2025, when there was no `auto`
        params.flash_attn = wanted == "on"
    else:
        _set(params, "flash_attn_type", _FLASH_ATTN[wanted], without=_FLASH_ATTN["auto"])


def _set_mmap_off(params: Any) -> None:
    if any(field[0] == "use_mmap" for field in params._fields_):  # until 2026
        params.use_mmap = False
    else:
        params.load_mode = 0  # LLAMA_LOAD_MODE_NONE


def _overrides(llama: Any, texts: Sequence[str]) -> Any:
    """llama.cpp's array of `KEY=TYPE:VALUE`, ended by an empty key; the texts were checked by the parent."""
    if not texts:
        return None
    array = (llama.llama_model_kv_override * (len(texts) + 1))()
    for item, text in zip(array, texts, strict=False):
        key, _, typed = text.partition("=")
        kind, _, value = typed.partition(":")
        item.key, item.tag = key.encode(), _OVERRIDE_TAGS[kind]
        if kind == "int":
            item.value.val_i64 = int(value)
        elif kind == "float":
            item.value.val_f64 = float(value)
        elif kind == "bool":
            item.value.val_bool = value == "true"
        else:
            item.value.val_str = value.encode()
    return array
