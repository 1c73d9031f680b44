"""The engine's process: reads one job from standard input, does it with llama.cpp, reports events.

Started by `runner.Engine` under any interpreter that has numpy and llama_cpp. Events are JSON lines
on a pipe of their own, since llama.cpp and what it loads may print anywhere; standard error is the
engine's last words. A job's result is its last event; a process that ends without one has died.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from diffharness.captures import CaptureWriter
from diffharness.engine.bindings import Ggml, devices, load_ggml, load_llama
from diffharness.engine.capture import Heartbeat, NodeReader
from diffharness.engine.nodes import is_wanted, table_for
from diffharness.errors import DiffharnessError, EngineError, FixtureError

Job = Mapping[str, Any]
_FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
_VOCAB_NONE = 0  # LLAMA_VOCAB_TYPE_NONE
_OVERRIDE_TAGS = {"int": 0, "float": 1, "bool": 2, "str": 3}


class Worker:
    """One job's state: the library, the pipe to the parent, the note of what is being done."""

    def __init__(self, event_fd: int, heartbeat_fd: int) -> None:
        self._events = os.fdopen(event_fd, "w", encoding="utf-8")
        self.heartbeat = Heartbeat(heartbeat_fd)

    def send(self, event: str, **fields: Any) -> None:
        self._events.write(json.dumps({"event": event, **fields}) + "\n")
        self._events.flush()

    def run(self, job: Job) -> None:
        """Does the job; errors become an `error` event with the error's class, for the parent to raise."""
        try:
            self.phase("import")
            self.llama = load_llama()
            self.ggml: Ggml = load_ggml(self.llama)
            self.llama.llama_backend_init()
            self.send("result", **_JOBS[job["kind"]](self, job))
        except DiffharnessError as err:
            self.send("error", kind=type(err).__name__, message=err.message, hint=err.hint)
        except MemoryError:
            self.send("error", kind="MemoryError", message="the engine's process has no memory left", hint=None)

    def phase(self, name: str) -> None:
        self.heartbeat.beat(phase=name)


@contextmanager
def _model(worker: Worker, job: Job, *, vocab_only: bool = False) -> Iterator[Any]:
    """The loaded model; a refusal is an EngineError, whose reason is in the engine's own words."""
    llama, settings = worker.llama, job.get("settings", {})
    params = llama.llama_model_default_params()
    params.vocab_only = vocab_only
    if settings:
        params.n_gpu_layers = settings["n_gpu_layers"]
        _set(params, settings["extra_bufts"], "use_extra_bufts")
        if not settings["use_mmap"]:
            _set_mmap_off(params)
    overrides = _overrides(llama, job.get("overrides", []))
    if overrides is not None:
        params.kv_overrides = overrides
    worker.phase("load")
    model = llama.llama_model_load_from_file(os.fsencode(job["model"]), params)
    if not model:
        raise EngineError(f"llama.cpp does not load {job['model']}")
    try:
        yield model
    finally:
        llama.llama_model_free(model)


def _set(params: Any, value: Any, *names: str) -> None:
    """Set the first of `names` that this version of the structure has."""
    known = {field[0] for field in params._fields_}
    for name in names:
        if name in known:
            setattr(params, name, value)
            return
    raise EngineError(f"this llama.cpp has no setting {names[0]}", hint="leave it at its default for this engine")


def _set_mmap_off(params: Any) -> None:
    if any(field[0] == "use_mmap" for field in params._fields_):  # until 2026
        params.use_mmap = False
    else:
        _set(params, 0, "load_mode")


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


@contextmanager
def _context(worker: Worker, job: Job, model: Any, n_ctx: int, callback: Any) -> Iterator[Any]:
    llama, settings = worker.llama, job["settings"]
    params = llama.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = min(settings["n_batch"], n_ctx)
    params.n_ubatch = min(settings["n_ubatch"], params.n_batch)
    params.n_threads = params.n_threads_batch = settings["threads"]
    params.type_k = worker.ggml.type_id(settings["type_k"], llama)
    params.type_v = worker.ggml.type_id(settings["type_v"], llama)
    _set(params, _FLASH_ATTN[settings["flash_attn"]], "flash_attn_type")
    _set(params, settings["swa_full"], "swa_full")
    _set(params, settings["op_offload"], "op_offload")
    if callback is not None:
        params.cb_eval = callback
    context = llama.llama_init_from_model(model, params)
    if not context:
        raise EngineError(f"llama.cpp makes no context of {n_ctx} tokens for {job['model']}")
    try:
        yield context
    finally:
        llama.llama_free(context)


def _capture(worker: Worker, job: Job) -> dict[str, Any]:
    """Evaluate chunks, each from an empty cache; logits of all positions and the wanted taps to a capture.

    Without taps no callback is installed, so that the run is what a user's would be. `trace` writes
    nothing but notes what begins. Returns the taps, node count, seconds, and what the engine is.
    """
    llama, chunks, trace = worker.llama, job["chunks"], job["trace"]
    started = time.monotonic()
    n_tokens = sum(map(len, chunks))
    writer = None if trace else CaptureWriter(job["out"], n_tokens, job["meta"])
    try:
        with _model(worker, job) as model:
            table = table_for(_metadata(llama, model, "general.architecture"))
            reader = NodeReader(worker.ggml, table, writer, job["taps"], worker.heartbeat, trace=trace)
            wants_nodes = trace or job["taps"] is None or bool(job["taps"])
            callback = llama.ggml_backend_sched_eval_callback(reader.callback) if wants_nodes else None
            with _context(worker, job, model, max(map(len, chunks)), callback) as context:
                worker.phase("eval")
                loaded = time.monotonic()
                row = 0
                for done, chunk in enumerate(chunks):
                    llama.llama_memory_clear(llama.llama_get_memory(context), True)
                    reader.start_chunk(row)
                    _evaluate(worker, context, model, chunk, row, writer, reader)
                    row += len(chunk)
                    worker.send("progress", done=done + 1, of=len(chunks))
                evaluated = time.monotonic()
        taps = writer.taps if writer else []
        if writer:
            writer.finish()
    finally:
        if writer:
            writer.discard()
    return {
        "taps": taps,
        "missing": [want for want in job["taps"] or [] if not any(is_wanted(tap, [want]) for tap in taps)],
        "n_nodes": reader.n_nodes,
        "load_s": loaded - started,
        "eval_s": evaluated - loaded,
        "info": _describe(worker),
    }


def _evaluate(
    worker: Worker,
    context: Any,
    model: Any,
    chunk: Sequence[int],
    row: int,
    writer: CaptureWriter | None,
    reader: NodeReader,
) -> None:
    """Decode one chunk in pieces of n_batch tokens, and store each piece's logits."""
    llama = worker.llama
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    outside = [token for token in chunk if not 0 <= token < n_vocab]
    if outside:
        raise FixtureError(f"token {outside[0]} is outside of the engine's vocabulary of {n_vocab}")
    n_batch = llama.llama_n_batch(context)
    batch = llama.llama_batch_init(min(n_batch, len(chunk)), 0, 1)
    try:
        for start in range(0, len(chunk), n_batch):
            piece = chunk[start : start + n_batch]
            batch.n_tokens = len(piece)
            for i, token in enumerate(piece):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
            status = llama.llama_decode(context, batch)
            if reader.error is not None:
                raise reader.error
            if status != 0:
                raise EngineError(f"llama_decode gives {status} at token {row + start}")
            logits = llama.llama_get_logits(context)
            if not logits:
                raise EngineError(f"no logits at token {row + start}")
            if writer is not None:
                writer.write("logits", row + start, np.ctypeslib.as_array(logits, shape=(len(piece), n_vocab)))
    finally:
        llama.llama_batch_free(batch)


def _metadata(llama: Any, model: Any, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    size = llama.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if size >= 0 else ""


def _tokenize(worker: Worker, job: Job) -> dict[str, Any]:
    """Texts to ids with the model's own vocabulary, and the pieces that those ids stand for."""
    llama = worker.llama
    with _model(worker, job, vocab_only=True) as model:
        worker.phase("tokenize")
        vocab = llama.llama_model_get_vocab(model)
        n_vocab = llama.llama_vocab_n_tokens(vocab)
        has_tokenizer = llama.llama_vocab_type(vocab) != _VOCAB_NONE
        if job["texts"] and not has_tokenizer:
            raise EngineError(f"{job['model']} has no tokenizer", hint="give token ids instead of text")
        texts = [_ids(llama, vocab, text, job["add_special"], job["parse_special"]) for text in job["texts"]]
        asked = {token for token in job["tokens"] if has_tokenizer and 0 <= token < n_vocab}
        return {
            "ids": texts,
            "pieces": {str(token): _piece(llama, vocab, token) for token in sorted(asked)},
            "n_vocab": n_vocab,
            "bos_id": llama.llama_vocab_bos(vocab),
            "eos_id": llama.llama_vocab_eos(vocab),
            "adds_bos": bool(llama.llama_vocab_get_add_bos(vocab)),
            "has_tokenizer": has_tokenizer,
        }


def _ids(llama: Any, vocab: Any, text: str, add_special: bool, parse_special: bool) -> list[int]:
    raw = text.encode()
    room = len(raw) + 16
    while True:
        ids = (llama.llama_token * room)()
        n = llama.llama_tokenize(vocab, raw, len(raw), ids, room, add_special, parse_special)
        if n >= 0:
            return list(ids[:n])
        if -n <= room:
            raise EngineError(f"the engine does not tokenize a text of {len(raw)} bytes: {n}")
        room = -n


def _piece(llama: Any, vocab: Any, token: int) -> str:
    room = 64
    while True:
        buffer = ctypes.create_string_buffer(room)
        n = llama.llama_token_to_piece(vocab, token, buffer, room, 0, True)
        if n >= 0:
            return buffer.raw[:n].decode("utf-8", "replace")
        room = -n


def _describe(worker: Worker) -> dict[str, Any]:
    """What this engine is: versions, commit, processor features, devices, where it lies."""
    llama, lib = worker.llama, worker.ggml.library
    version = getattr(llama._lib, "llama_version", None)
    if version is not None:
        version.restype = ctypes.c_char_p
    try:
        bindings = importlib.metadata.version("llama_cpp_python")
    except importlib.metadata.PackageNotFoundError:
        bindings = "unknown"
    return {
        "version": version().decode() if version is not None else "unknown",
        "ggml_version": lib.ggml_version().decode(),
        "commit": lib.ggml_commit().decode(),
        "system_info": llama.llama_print_system_info().decode().strip(" |"),
        "bindings": f"llama-cpp-python {bindings}",
        "library": str(llama._lib._name),
        "devices": devices(llama),
        "python": sys.executable,
    }


def _quantize_rows(worker: Worker, job: Job) -> dict[str, Any]:
    """Rows of a raw float32 file to a raw file of blocks, item after item; returns each item's bytes."""
    worker.phase("quantize")
    source = np.memmap(job["source"], dtype=np.uint8, mode="r")
    sizes = []
    with open(job["out"], "wb") as out:
        for item in job["items"]:
            n_rows, n_per_row = item["n_rows"], item["n_per_row"]
            start, type_id = item["offset"], worker.ggml.type_id(item["type"], worker.llama)
            begun = out.tell()
            step = max(1, (16 << 20) // (4 * n_per_row))
            for row in range(0, n_rows, step):
                end = min(n_rows, row + step)
                raw = source[start + row * n_per_row * 4 : start + end * n_per_row * 4]
                out.write(worker.ggml.quantize(raw.view(np.float32).reshape(end - row, n_per_row), type_id).data)
            sizes.append(out.tell() - begun)
    return {"sizes": sizes}


def _quantize_file(worker: Worker, job: Job) -> dict[str, Any]:
    """llama_model_quantize: a file to a mixture (`Q4_K_M`), or each tensor to the type that it is given."""
    llama = worker.llama
    ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{job['ftype']}", None)
    if ftype is None:
        raise EngineError(f"this llama.cpp has no quantization {job['ftype']}")
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = job["threads"], ftype, True
    types = job["types"]
    if types:
        array = (llama.llama_model_tensor_override * (len(types) + 1))()
        for item, (pattern, name) in zip(array, types.items(), strict=False):
            item.pattern, item.type = pattern.encode(), worker.ggml.type_id(name, llama)
        params.tt_overrides, params.pure = array, True
    worker.phase("quantize")
    status = llama.llama_model_quantize(os.fsencode(job["model"]), os.fsencode(job["out"]), ctypes.byref(params))
    if status != 0:
        raise EngineError(f"llama.cpp does not quantize {job['model']}: {status}")
    return {}


_JOBS: Mapping[str, Callable[[Worker, Job], dict[str, Any]]] = {
    "capture": _capture,
    "tokenize": _tokenize,
    "info": lambda worker, job: _describe(worker),
    "quantize_rows": _quantize_rows,
    "quantize_file": _quantize_file,
}


def main(event_fd: int, heartbeat_fd: int) -> None:
    """Entry of the bootstrap: the job is on standard input; what prints to standard output goes to standard error."""
    job = json.load(sys.stdin)
    os.dup2(2, 1)
    Worker(event_fd, heartbeat_fd).run(job)
