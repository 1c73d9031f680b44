"""Interpreters that stand for other builds: this very one, with a few lines run before each of the worker's jobs."""

from __future__ import annotations

from pathlib import Path

from .patched import patched_python

_BEFORE = """
import os, signal, time

CODE = {code!r}


def patch(worker):
    run = worker.run

    def before(session, job):
        exec(CODE, dict(job=job, session=session, worker=worker, os=os, signal=signal, time=time))
        return run(session, job)

    worker.run = before
"""

SAME = ""
OTHER_ROPE = "job['kind'] == 'capture' and job['overrides'].append('llama.rope.freq_base=float:123')"
OTHER_NUMBERS = """
write = worker.CaptureWriter.write
worker.CaptureWriter.write = lambda self, tap, row, x: write(self, tap, row, x * 1.01 if tap == 'logits' else x)
"""
DIES_LOADING = "session.phase('import'); os.kill(os.getpid(), signal.SIGILL)"
DIES_RUNNING = "job['kind'] == 'capture' and (session.phase('eval'), os.kill(os.getpid(), signal.SIGSEGV))"
HANGS_LOADING = "session.phase('load'); time.sleep(1000)"


def stand_in(folder: Path, code: str = SAME) -> Path:
    """A script to give as an engine; `code` sees `job`, `session`, `worker`, `os`, `signal`, `time`."""
    return patched_python(folder, "diffharness.engine.worker", _BEFORE.format(code=code))
