"""Interpreters that are planted with a fault: a wrapper script that makes the worker die at one node.

The script starts this very interpreter with a sitecustomize that patches the worker after it is
imported. `when` is a Python expression over `settings` (the job's) and `trace`.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

_SITECUSTOMIZE = """
import importlib.abc, importlib.machinery, os, signal, sys, time

NODE, ACTION, WHEN = {node!r}, {action!r}, {when!r}


def act():
    if ACTION == "abort":
        os.write(2, b"/src/ggml-cpu.c:12: GGML_ASSERT(ne00 == ne01) failed\\n")
        os.abort()
    elif ACTION == "hang":
        time.sleep(1000)
    elif ACTION == "silent":
        os._exit(0)
    elif ACTION == "exit3":
        os._exit(3)
    elif ACTION == "memory":
        raise MemoryError
    elif ACTION == "allocate":
        os.write(2, b"ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 99999999999\\n")
        os.abort()
    elif ACTION == "raise":
        raise ZeroDivisionError("planted")
    elif ACTION == "orphan":
        import subprocess
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)
    else:
        os.kill(os.getpid(), getattr(signal, ACTION))


def patch(worker):
    run, ask = worker.run, worker.NodeReader._ask
    job = {{}}

    def patched_run(session, given):
        job.update(given)
        return run(session, given)

    def patched_ask(self, address):
        wanted = ask(self, address)
        if self._ggml.node(address).name == NODE:
            settings = job["settings"]
            if eval(WHEN, {{"settings": settings, "trace": job["trace"], "row": self._row, "job": job}}):
                act()
        return wanted

    worker.run, worker.NodeReader._ask = patched_run, patched_ask


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "diffharness.engine.worker":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


def planted_python(folder: Path, action: str, *, node: str = "ffn_norm-1", when: str = "True") -> Path:
    """A script to give as `EngineSettings.python`; `action` is a signal's name or one of `act`'s words."""
    folder.mkdir(parents=True, exist_ok=True)
    code = _SITECUSTOMIZE.format(node=node, action=action, when=when)
    (folder / "sitecustomize.py").write_text(code)
    script = folder / "python"
    script.write_text(
        textwrap.dedent(f"""\
            #!/bin/sh
            PYTHONPATH='{folder}' exec '{sys.executable}' "$@"
            """)
    )
    script.chmod(0o755)
    return script
