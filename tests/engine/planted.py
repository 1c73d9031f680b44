"""Interpreters that are planted with a fault: a wrapper script that makes the worker die or err at one node.

The script starts this very interpreter with a sitecustomize that patches the worker after it is
imported. `when` is a Python expression over `settings` (the job's), `trace`, `row` and, where nodes are
recorded, `n_tokens`. The action `alter` lets the node compute something wrong, where nodes are recorded.
`everywhere` makes captures die too that watch no node, as on a machine whose default path is broken.
"""

from __future__ import annotations

from pathlib import Path

from .patched import patched_python

_PATCH = """
import ctypes, os, signal, time

NODE, ACTION, WHEN, EVERYWHERE = {node!r}, {action!r}, {when!r}, {everywhere!r}


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


def alter(address):
    # the last value of a float32 node's first row comes out wrong, as of a wrong kernel
    from diffharness.engine.bindings import GgmlTensor

    tensor = GgmlTensor.from_address(address)
    value = ctypes.c_float.from_address(tensor.data + 4 * (tensor.ne[0] - 1))
    value.value += 1.0


def patch(worker):
    from diffharness.engine.recording import NodeRecorder

    run, ask, done = worker.run, worker.NodeReader._ask, NodeRecorder._done
    record_ask = NodeRecorder._ask
    job = {{}}

    def patched_run(session, given):
        job.update(given)
        trace = given.get("trace")
        told = {{"settings": given["settings"], "trace": trace, "row": 0, "job": given, "n_tokens": None}}
        is_plain = given["kind"] == "capture" and given["taps"] == [] and not trace
        if EVERYWHERE and is_plain and eval(WHEN, told):
            session.load_library()
            session.phase("eval")
            act()
        return run(session, given)

    def is_there(self, address):
        if self._ggml.node(address).name != NODE:
            return False
        told = {{"settings": job["settings"], "trace": job.get("trace"), "row": self._row, "job": job}}
        return eval(WHEN, {{**told, "n_tokens": getattr(self, "_n_tokens", None)}})

    def acting(ask):
        def patched_ask(self, address):
            wanted = ask(self, address)
            if ACTION != "alter" and is_there(self, address):
                act()
            return wanted

        return patched_ask

    def patched_done(self, address):
        if ACTION == "alter" and is_there(self, address):
            alter(address)
        return done(self, address)

    worker.run, worker.NodeReader._ask = patched_run, acting(ask)
    NodeRecorder._ask, NodeRecorder._done = acting(record_ask), patched_done
"""


def planted_python(
    folder: Path, action: str, *, node: str = "ffn_norm-1", when: str = "True", everywhere: bool = False
) -> Path:
    """A script to give as `EngineSettings.python`; `action` is a signal's name or one of `act`'s words."""
    code = _PATCH.format(node=node, action=action, when=when, everywhere=everywhere)
    return patched_python(folder, "diffharness.engine.worker", code)
