"""The worker process: start it, follow it, and say what became of it.

The worker runs under this interpreter or another (`settings.python`), sees only this package's
modules and what its interpreter has, leads its own process group, and dies with its parent. However
it ends, `run_job` returns its result or raises: the worker's own errors as they are, anything else
as an `EngineCrash` with the signal, the last words and the node that was begun.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Literal

import diffharness
from diffharness.engine.capture import HEARTBEAT_SIZE, read_heartbeat
from diffharness.errors import DiffharnessError, EngineError, FixtureError, OutputError
from diffharness.settings import EngineSettings

CrashKind = Literal["signal", "abort", "exit", "hang", "oom", "refused"]
Progress = Callable[[int, int], None]

# A bare package whose __path__ is ours: the worker finds our modules and nothing else of our environment.
_BOOTSTRAP = """
import ctypes, os, sys, types
if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed, and this one is " + sys.version.split()[0])
sys.path[:] = [p for p in sys.path if p]
package, events, heartbeat, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != parent:
        os._exit(0)
bare = types.ModuleType("diffharness")
bare.__path__ = [package]
sys.modules["diffharness"] = bare
from diffharness.engine.worker import main
main(events, heartbeat)
"""

_LAST_WORDS = 400  # lines of standard error that are kept
_LONGEST_LINE = 1 << 16  # bytes; what is longer comes as several lines
_START_S = 120.0  # an interpreter that has not begun by then runs something else
_PATH = re.compile(r"\S*/\S*")
_NO_MEMORY = re.compile(r"failed to allocate|unable to allocate|out of memory|bad_alloc|cannot allocate memory", re.I)
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '(?P<name>\w+)")
_TELLING = re.compile(r"GGML_ASSERT|GGML_ABORT|error|failed|terminate called|what\(\)|refus|invalid", re.I)


class EngineCrash(EngineError):
    """The engine died or refused: how, where, and what it said last."""

    def __init__(
        self,
        message: str,
        *,
        kind: CrashKind,
        hint: str | None = None,
        signal_name: str | None = None,
        exit_code: int | None = None,
        last_words: Sequence[str] = (),
        node: Mapping[str, Any] | None = None,
        phase: str = "start",
    ) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.signal_name = signal_name
        self.engine_exit_code = exit_code
        self.last_words = list(last_words)
        # `node` and `op`; of a traced run also types and shapes, of another the `first` of the nodes that were begun
        self.node = dict(node or {})
        self.phase = phase

    @property
    def is_unusable(self) -> bool:
        """Whether it refused, or died before there was a model: no settings change that."""
        return self.kind == "refused" or self.phase in ("start", "import")

    def as_dict(self) -> dict[str, Any]:
        """Evidence for a finding."""
        return {
            "kind": self.kind,
            "signal": self.signal_name,
            "exit_code": self.engine_exit_code,
            "phase": self.phase,
            "node": self.node or None,
            "last_words": self.last_words[-12:],
        }


def run_job(
    settings: EngineSettings, job: Mapping[str, Any], progress: Progress | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The job's result and the worker's standard error, or EngineCrash, or OutputError if the disk is full.

    Whatever happens, Ctrl-C included, no process of the worker's group is left when this returns.
    """
    with tempfile.TemporaryFile() as heartbeat:
        heartbeat.truncate(HEARTBEAT_SIZE)
        worker = _Worker(settings, heartbeat.fileno())
        try:
            worker.send(job)
            worker.end_input()
            event = worker.follow(progress)
        finally:
            worker.kill()
        words = worker.last_words()
        if event is not None and event["event"] == "result":
            del event["event"]
            return event, words
        note = read_heartbeat(heartbeat.fileno())
    raise _failure(worker, event, words, note)


class Dialogue:
    """A worker that stays for one job of many requests, each answered by one event.

    Close it, or use it as a context manager: no process of the worker's group is left then. A worker that
    died, was stopped or was interrupted in a request is closed already.
    """

    def __init__(self, settings: EngineSettings, job: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Starts the worker, which inherits `descriptors`. Raises EngineCrash."""
        self.closed = False
        with contextlib.ExitStack() as stack:
            self._heartbeat = stack.enter_context(tempfile.TemporaryFile())
            self._heartbeat.truncate(HEARTBEAT_SIZE)
            self._worker = _Worker(settings, self._heartbeat.fileno(), descriptors)
            stack.pop_all()
        self._worker.send(job)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The `answer` event. Raises EngineCrash; after a `refused` event the worker waits for the next request."""
        try:
            self._worker.send(request)
            event = self._worker.follow(None)
        except BaseException:
            self.close()
            raise
        if event is not None and event["event"] == "answer":
            return event
        note = read_heartbeat(self._heartbeat.fileno())
        if event is None or event["event"] != "refused":
            self.close()
        raise _failure(self._worker, event, self._worker.last_words(), note)

    def close(self) -> None:
        """Stop the worker and wait for it; may be called again."""
        if not self.closed:
            self.closed = True
            self._worker.kill()
            self._heartbeat.close()

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """A running worker: its pipes, its deadline, and how it ended."""

    def __init__(self, settings: EngineSettings, heartbeat_fd: int, descriptors: Sequence[int] = ()) -> None:
        self.limit_s = settings.time_limit_s
        self.timed_out = False
        self._heartbeat_fd = heartbeat_fd
        events, event_fd = os.pipe()
        package = os.path.dirname(os.path.abspath(diffharness.__file__))
        self.python = python = str(settings.python or sys.executable)
        arguments = [package, str(event_fd), str(heartbeat_fd), str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                [python, "-c", _BOOTSTRAP, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_environment(settings),
                pass_fds=(event_fd, heartbeat_fd, *descriptors),
                start_new_session=True,
            )
        except OSError as err:
            os.close(events)
            raise EngineCrash(
                f"cannot start {python}: {err.strerror}",
                kind="refused",
                hint="it must be an interpreter for this machine",
            ) from err
        finally:
            os.close(event_fd)
        self._events = os.fdopen(events, "rb", buffering=0)
        self._words: deque[str] = deque(maxlen=_LAST_WORDS)
        assert self.process.stderr is not None
        self._listener = threading.Thread(target=self._listen, args=(self.process.stderr,), daemon=True)
        self._listener.start()

    def send(self, job: Mapping[str, Any]) -> None:
        """A job, or a request of one, as a line."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already, which `follow` will see
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def end_input(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def follow(self, progress: Progress | None) -> dict[str, Any] | None:
        """The last event, a result or an error; None if the worker ended or was stopped without one."""
        began = time.monotonic()
        deadline, has_begun = began + self.limit_s, False
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._events, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                # a process that it started may hold the pipe open, so look at the worker itself too
                ended = self.process.poll() is not None
                if not selector.select(0 if ended else min(left, 0.5)):
                    if ended:
                        return None
                    has_begun = has_begun or bool(read_heartbeat(self._heartbeat_fd))
                    if not has_begun and time.monotonic() - began > _START_S:
                        break
                    continue
                chunk = self._events.read(1 << 16)
                if not chunk:
                    self._wait(deadline)
                    return None
                *lines, pending = (pending + chunk).split(b"\n")
                for event in filter(None, map(_event, lines)):
                    if event["event"] != "progress":
                        return event
                    if progress is not None:
                        progress(event["done"], event["of"])
        self.timed_out = True
        return None

    def kill(self) -> None:
        """Stop the worker and all that it started, and wait for it."""
        # after a result it only has to free its memory; killing is quicker
        if self.process.poll() is None:
            _kill_group(self.process.pid)
        self.process.wait()
        _kill_group(self.process.pid)
        self._listener.join(timeout=5)
        self._events.close()
        for pipe in (self.process.stdin, self.process.stderr):
            if pipe is not None and not self._listener.is_alive():
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def last_words(self) -> list[str]:
        return list(self._words)

    def _wait(self, deadline: float) -> None:
        try:
            self.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.timed_out = True

    def _listen(self, stderr: IO[bytes]) -> None:
        while line := stderr.readline(_LONGEST_LINE):
            self._words.append(line.decode("utf-8", "replace").rstrip())


def _event(line: bytes) -> dict[str, Any] | None:
    """One line of the pipe; None for what the worker did not write, since an engine may write anywhere."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _environment(settings: EngineSettings) -> dict[str, str]:
    environment = dict(os.environ)
    environment["GGML_NO_BACKTRACE"] = "1"  # an abort would start a debugger
    environment["PYTHONUNBUFFERED"] = "1"
    if settings.python is not None:
        environment.pop("PYTHONPATH", None)  # it is meant for this interpreter
        environment.pop("PYTHONHOME", None)
    if settings.lib_dir is not None:
        folder = str(settings.lib_dir.absolute())
        environment["LLAMA_CPP_LIB_PATH"] = folder
        search = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = f"{folder}{os.pathsep}{search}" if search else folder
    return environment


# Errors of the worker that are not the engine's fault.
_PASSED_ON: Mapping[str, type[DiffharnessError]] = {kind.__name__: kind for kind in (OutputError, FixtureError)}


def _failure(
    worker: _Worker, event: Mapping[str, Any] | None, words: Sequence[str], note: dict[str, Any]
) -> DiffharnessError:
    """What to raise for a worker that reported an error, or ended without an event; `note` is its heartbeat's."""
    phase, node = note.pop("phase", "start"), note
    if event is not None:
        return _reported(event, words, phase)
    if phase == "start" and (worker.timed_out or worker.process.returncode >= 0):
        return _not_begun(worker, words)
    return _died(worker, words, node, phase)


def _not_begun(worker: _Worker, words: Sequence[str]) -> EngineCrash:
    """An interpreter that ended by itself, or never came to the worker's first step; no engine has run."""
    said = next((line for line in reversed(words) if line.strip()), "")
    found = _NO_MODULE.search(said)
    if found:
        what, hint = f"has no {found['name']}", f"{worker.python} -m pip install {found['name']}"
    else:
        limit_s, code = min(worker.limit_s, _START_S), worker.process.returncode
        ends = f"has not begun after {limit_s:g} s" if worker.timed_out else f"ends with exit code {code}"
        what = f"is no interpreter that can run the engine: it {ends}" + (f" and says {said!r}" if said else "")
        hint = "give a Python 3.10 or newer with llama-cpp-python"
    return EngineCrash(f"{worker.python} {what}", kind="refused", hint=hint, last_words=words[-12:])


def _reported(event: Mapping[str, Any], words: Sequence[str], phase: str) -> DiffharnessError:
    """The error that the worker lived to report."""
    message, hint = str(event["message"]), event["hint"]
    if event["kind"] in _PASSED_ON:
        return _PASSED_ON[event["kind"]](message, hint=hint)
    told = _telling(words)
    no_memory = event["kind"] == MemoryError.__name__ or any(_NO_MEMORY.search(line) for line in words)
    if phase in ("load", "eval") and told:
        message = f"{message}: {told[0]}"
    kind: CrashKind = "oom" if no_memory else "refused"
    return EngineCrash(message, kind=kind, hint=hint, last_words=told or words[-5:], phase=phase)


def _died(worker: _Worker, words: Sequence[str], node: Mapping[str, Any], phase: str) -> EngineCrash:
    """What became of a worker that ended without an event."""
    code = worker.process.returncode
    signal_name = _signal_name(-code) if code < 0 and not worker.timed_out else None
    kind: CrashKind
    if worker.timed_out:
        kind, what = "hang", f"the engine did not finish within {worker.limit_s:g} s"
    elif any(_NO_MEMORY.search(line) for line in words[-20:]):
        kind, what = "oom", "the engine ran out of memory"
    elif code == -signal.SIGKILL:
        kind, what = "oom", "the engine was killed from outside (SIGKILL), as the system does when memory runs out"
    elif code == -signal.SIGABRT:
        kind, what = "abort", "the engine aborted"
    elif code < 0:
        foreign = ", an instruction that this processor does not have," if signal_name == "SIGILL" else ""
        kind, what = "signal", f"the engine died of {signal_name}{foreign}"
    else:
        kind, what = "exit", f"the engine ended with exit code {code} and without a result"
    told = _telling(words)
    message = what + (f" while {_DOING[phase]}" if phase in _DOING else "")
    if node.get("node"):
        first = node.get("first")
        span = f" (between {first} and it)" if first and first != node["node"] else ""
        message += f", last node begun: {node['node']} ({node['op']}){span}"
    if told:
        message += f"; it said: {told[-1]}"
    return EngineCrash(
        message,
        kind=kind,
        signal_name=signal_name,
        exit_code=code if code >= 0 else None,
        last_words=[line for line in words if line][-40:],
        node=node if node.get("node") else None,
        phase=phase,
    )


def _telling(words: Sequence[str]) -> list[str]:
    """Lines that sound like a reason; what a path is called does not count."""
    return [line for line in words if _TELLING.search(_PATH.sub("", line))]


_DOING = {
    "import": "loading its libraries",
    "load": "loading the model",
    "eval": "evaluating tokens",
    "tokenize": "tokenizing",
    "quantize": "quantizing",
}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
