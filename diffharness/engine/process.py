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
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import IO, Any

import diffharness
from diffharness.allocator import give_back_memory
from diffharness.engine.capture import HEARTBEAT_SIZE, read_heartbeat
from diffharness.engine.crash import Ended, EngineCrash, failure
from diffharness.settings import EngineSettings

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

NOTHING_MORE: Mapping[str, str] = MappingProxyType({})

_LAST_WORDS = 400  # lines of standard error that are kept
_LONGEST_LINE = 1 << 16  # bytes; what is longer comes as several lines
_START_S = 120.0  # an interpreter that has not begun by then runs something else


def run_job(
    settings: EngineSettings, job: Mapping[str, Any], progress: Progress | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The job's result and the worker's standard error, or EngineCrash, or OutputError if the disk is full.

    Whatever happens, Ctrl-C included, no process of the worker's group is left when this returns.
    """
    give_back_memory()
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
    raise failure(worker.ended, event, words, note)


class Dialogue:
    """A worker that stays for one job of many requests, each answered by one event.

    Close it, or use it as a context manager: no process of the worker's group is left then. A worker that
    died, was stopped or was interrupted in a request is closed already.
    """

    def __init__(
        self,
        settings: EngineSettings,
        job: Mapping[str, Any],
        descriptors: Sequence[int] = (),
        environment: Mapping[str, str] = NOTHING_MORE,
    ) -> None:
        """Starts the worker, which inherits `descriptors`. Raises EngineCrash.

        Of `environment` it gets the variables that this process does not have.
        """
        self.closed = False
        with contextlib.ExitStack() as stack:
            self._heartbeat = stack.enter_context(tempfile.TemporaryFile())
            self._heartbeat.truncate(HEARTBEAT_SIZE)
            self._worker = _Worker(settings, self._heartbeat.fileno(), descriptors, environment)
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
        raise failure(self._worker.ended, event, self._worker.last_words(), note)

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

    def __init__(
        self,
        settings: EngineSettings,
        heartbeat_fd: int,
        descriptors: Sequence[int] = (),
        environment: Mapping[str, str] = NOTHING_MORE,
    ) -> None:
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
                env={**environment, **_environment(settings)},
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

    @property
    def ended(self) -> Ended:
        """How it came to its end, as far as it has."""
        return Ended(self.python, self.limit_s, _START_S, self.timed_out, self.process.returncode)

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
