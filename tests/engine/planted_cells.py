"""Interpreters whose worker serves a grid's cells with one fault: it dies, hangs, or changes what a cell gives.

Like `planted.py`: a wrapper script with a sitecustomize that patches `diffharness.engine.exercise` once it is
imported. `when` is a Python expression over the cell's `request` and its `settings`.
"""

from __future__ import annotations

from pathlib import Path

from .patched import patched_python

_PATCH = """
import os, signal, time

ACTION, WHEN, NODE, ROW, SIZE = {action!r}, {when!r}, {node!r}, {row!r}, {size!r}


def act():
    if ACTION == "hang":
        time.sleep(1000)
    elif ACTION == "silent":
        os._exit(0)
    else:
        os.kill(os.getpid(), getattr(signal, ACTION))


def patch(exercise):
    perform, play, write = exercise.perform, exercise.Player.play, exercise.CaptureWriter.write
    ask = exercise.NodeReader._ask
    now = {{}}

    def is_meant():
        return bool(now) and eval(WHEN, {{"request": now, "settings": now["settings"]}})

    def patched_perform(session, model, request):
        now.clear()
        now.update(request)
        return perform(session, model, request)

    def patched_play(self, chunk, row, script):
        if ACTION != "skew" and is_meant() and not now["trace"]:
            act()
        return play(self, chunk, row, script)

    def patched_ask(self, address):
        wanted = ask(self, address)
        if ACTION != "skew" and is_meant() and now["trace"] and self._ggml.node(address).name == NODE:
            act()
        return wanted

    def patched_write(self, tap, start, values):
        is_tap = tap == now.get("skewed", "logits")
        if ACTION == "skew" and is_meant() and is_tap and start <= ROW < start + len(values):
            values = values.copy()
            values[ROW - start, :3] += SIZE
        return write(self, tap, start, values)

    exercise.perform, exercise.Player.play, exercise.CaptureWriter.write = patched_perform, patched_play, patched_write
    exercise.NodeReader._ask = patched_ask
"""


def planted_cells(
    folder: Path, action: str, *, when: str, node: str = "ffn_norm-1", row: int = 0, size: float = 5.0
) -> Path:
    """A script to give as `EngineSettings.python`.

    `action` is a signal's name, `hang`, `silent`, or `skew`: `size` is added to three logits of token `row`. A death
    is at `node` in a run that is traced.
    """
    return patched_python(
        folder,
        "diffharness.engine.exercise",
        _PATCH.format(action=action, when=when, node=node, row=row, size=size),
    )
