"""Interpreters that stand for other builds: this very one, with a few lines run before each of the worker's jobs."""

from __future__ import annotations

import sys
from pathlib import Path

_SITECUSTOMIZE = """
import importlib.abc, importlib.machinery, os, signal, sys, time

CODE = {code!r}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "diffharness.engine.worker":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(worker):
            execute(worker)
            run = worker.run

            def before(session, job):
                exec(CODE, dict(job=job, session=session, worker=worker, os=os, signal=signal, time=time))
                return run(session, job)

            worker.run = before

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(code=code))
    script = folder / "python"
    script.write_text(f"#!/bin/sh\nPYTHONPATH='{folder}' exec '{sys.executable}' \"$@\"\n")
    script.chmod(0o755)
    return script
