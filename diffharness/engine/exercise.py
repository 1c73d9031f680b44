"""The worker's job behind `matrix`: one loaded model, and text fed to it in many ways, request after request.

A request has its own context settings and a script for each chunk (player.py). What a model's memory cannot do is
answered with the reason, not with an error; what llama.cpp refuses is a `refused` event, and a death is the parent's
to see. Standard library, numpy and llama_cpp only.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from itertools import chain
from typing import Any

from diffharness.captures import CaptureWriter
from diffharness.engine.capture import NodeReader
from diffharness.engine.decoding import check_tokens
from diffharness.engine.kv_rounding import CacheRounder
from diffharness.engine.nodes import table_for
from diffharness.engine.player import ImpossibleError, Player, Watch
from diffharness.engine.session import Job, Session
from diffharness.errors import DiffharnessError


def serve_cells(session: Session, job: Job) -> dict[str, Any]:
    """Load the model, then requests on standard input, a line each, until it ends.

    An answer has `not_run` (a reason, or null), `taps`, `rows` ([start, stop) of what was recorded, by logits'
    name), `n_nodes` and `eval_s`. What llama.cpp refuses is a `refused` event.
    """
    with session.model(job) as model:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = perform(session, model, {**job, **request})
            except ImpossibleError as err:
                session.send("answer", not_run=err.message)
            except DiffharnessError as err:
                session.send("refused", kind=type(err).__name__, message=err.message, hint=err.hint)
            else:
                session.send("answer", not_run=None, **answer)
    return {}


def perform(session: Session, model: Any, request: Job) -> dict[str, Any]:
    """One request, in a context of its own."""
    llama, chunks, out = session.llama, request["chunks"], request["out"]
    check_tokens(llama, model, chain.from_iterable(chunks))
    writer = CaptureWriter(out, sum(map(len, chunks)), request["meta"]) if out and not request["trace"] else None
    reader = rounder = None
    if request["trace"] or request["taps"]:
        table = table_for(request["arch"])
        reader = NodeReader(session.ggml, table, writer, request["taps"], session.heartbeat, trace=request["trace"])
    if request["rounded"] is not None:
        rounder = CacheRounder(session.ggml, *request["rounded"])
    watch = Watch(reader, rounder)
    callback = llama.ggml_backend_sched_eval_callback(watch.callback) if reader or rounder else None
    with writer or nullcontext():
        with session.context(request, model, request["n_ctx"], callback) as context:
            session.phase("eval")
            started = time.monotonic()
            player = Player(session, model, context, writer, watch)
            row = 0
            for chunk, script in zip(chunks, request["scripts"], strict=True):
                player.play(chunk, row, script)
                row += len(chunk)
            seconds = time.monotonic() - started
        rows = player.close()
    return {
        "taps": writer.taps if writer else [],
        "rows": rows,
        "n_nodes": reader.n_nodes if reader else 0,
        "eval_s": seconds,
    }
