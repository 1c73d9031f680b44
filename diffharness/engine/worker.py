"""The engine's process: reads a job from standard input, does it with llama.cpp, reports events.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from diffharness.captures import CaptureWriter, Float32Array
from diffharness.engine.capture import NodeReader
from diffharness.engine.decoding import Entry, check_tokens, decode, decode_states, logits, n_vocab, read_states
from diffharness.engine.exercise import serve_cells
from diffharness.engine.loading import devices
from diffharness.engine.nodes import is_wanted, table_for
from diffharness.engine.quantize_jobs import quantize_file, serve_quantizer
from diffharness.engine.recording import record
from diffharness.engine.session import Job, Session
from diffharness.errors import DiffharnessError, EngineError

_VOCAB_NONE = 0  # LLAMA_VOCAB_TYPE_NONE


def run(session: Session, job: Job) -> None:
    """Do the job; errors become an `error` event with the error's class, for the parent to raise."""
    try:
        session.load_library()
        session.send("result", **_JOBS[job["kind"]](session, job))
    except DiffharnessError as err:
        session.send("error", kind=type(err).__name__, message=err.message, hint=err.hint)
    except MemoryError:
        session.send("error", kind="MemoryError", message="the engine's process has no memory left", hint=None)


def _capture(session: Session, job: Job) -> dict[str, Any]:
    """Evaluate chunks, each from an empty cache; logits of all positions and the wanted taps to a capture.

    Without taps no callback is installed, so that the run is what a user's would be. `trace` writes
    nothing but notes what begins. With `states`, a tap of a capture, the chunks' tokens are only counted, and their
    hidden states from there go in. Returns the taps, node count, seconds, and what the engine is.
    """
    llama, chunks, trace = session.llama, job["chunks"], job["trace"]
    started = time.monotonic()
    n_tokens = sum(map(len, chunks))
    states = None if job["states"] is None else read_states(job["states"])
    writer = None if trace else CaptureWriter(job["out"], n_tokens, job["meta"])
    with writer or nullcontext(), session.model(job) as model:
        table = table_for(_metadata(llama, model, "general.architecture"))
        reader = NodeReader(
            session.ggml, table, writer, job["taps"], session.heartbeat, trace=trace, first_layer=job["first_layer"]
        )
        wants_nodes = trace or job["taps"] is None or bool(job["taps"])
        callback = llama.ggml_backend_sched_eval_callback(reader.callback) if wants_nodes else None
        with session.context(job, model, max(map(len, chunks)), callback) as context:
            session.phase("eval")
            loaded = time.monotonic()
            row = 0
            for done, chunk in enumerate(chunks):
                session.forget(context)
                reader.start_chunk(row)
                if states is None:
                    _evaluate(session, context, model, chunk, row, writer, reader)
                else:
                    _evaluate_states(session, context, model, states[row : row + len(chunk)], row, writer, reader)
                row += len(chunk)
                session.send("progress", done=done + 1, of=len(chunks))
            evaluated = time.monotonic()
    taps = writer.taps if writer else []
    return {
        "taps": taps,
        "missing": [want for want in job["taps"] or [] if not any(is_wanted(tap, [want]) for tap in taps)],
        "n_nodes": reader.n_nodes,
        "load_s": loaded - started,
        "eval_s": evaluated - loaded,
        "info": _describe(session),
    }


def _evaluate(
    session: Session,
    context: Any,
    model: Any,
    chunk: Sequence[int],
    row: int,
    writer: CaptureWriter | None,
    reader: NodeReader,
) -> None:
    """Decode one chunk in pieces of n_batch tokens, and store each piece's logits."""
    llama = session.llama
    check_tokens(llama, model, chunk)
    n_batch = llama.llama_n_batch(context)
    for start in range(0, len(chunk), n_batch):
        entries = [Entry(token, at) for at, token in enumerate(chunk[start : start + n_batch], start=start)]
        decode(llama, context, entries, row + start, reader)
        values = logits(llama, context, (len(entries), n_vocab(llama, model)), row + start)
        if writer is not None:
            writer.write("logits", row + start, values)


def _evaluate_states(
    session: Session,
    context: Any,
    model: Any,
    states: Float32Array,
    row: int,
    writer: CaptureWriter | None,
    reader: NodeReader,
) -> None:
    """Decode one chunk of hidden states [n, width] in pieces of n_ubatch: one graph each, so that rows are counted."""
    llama = session.llama
    step = min(llama.llama_n_batch(context), llama.llama_n_ubatch(context))
    for start in range(0, len(states), step):
        piece = states[start : start + step]
        reader.start_fed(row + start, len(piece))
        decode_states(llama, context, model, piece, start, row + start, reader)
        values = logits(llama, context, (len(piece), n_vocab(llama, model)), row + start)
        if writer is not None:
            writer.write("logits", row + start, values)


def _metadata(llama: Any, model: Any, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    size = llama.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if size >= 0 else ""


def _tokenize(session: Session, job: Job) -> dict[str, Any]:
    """Texts to ids with the model's own vocabulary, and the pieces that those ids stand for."""
    llama = session.llama
    with session.model(job, vocab_only=True) as model:
        session.phase("tokenize")
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


def _describe(session: Session) -> dict[str, Any]:
    """What this engine is: versions, commit, processor features, devices, where it lies."""
    llama, lib = session.llama, session.ggml.library
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


_JOBS: Mapping[str, Callable[[Session, Job], dict[str, Any]]] = {
    "capture": _capture,
    "tokenize": _tokenize,
    "info": lambda session, job: _describe(session),
    "quantize_file": quantize_file,
    "serve_quantizer": serve_quantizer,
    "serve_cells": serve_cells,
    "record": record,
}


def main(event_fd: int, heartbeat_fd: int) -> None:
    """Entry of the bootstrap: the job is standard input's first line; what is printed goes to standard error."""
    job = json.loads(sys.stdin.readline())
    os.dup2(2, 1)
    run(Session(event_fd, heartbeat_fd), job)
