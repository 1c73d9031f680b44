"""How an engine's process ended, in words and as an error: what it reported, or the signal and its last words.

Nothing is run here: what there is to go by are the exit code, standard error and the heartbeat's last note.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffharness.errors import DiffharnessError, EngineError, FixtureError, OutputError

CrashKind = Literal["signal", "abort", "exit", "hang", "oom", "refused"]

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


@dataclass(frozen=True)
class Ended:
    """A worker's end. `code` is negative for a signal; of one that reported its error it says nothing."""

    python: str
    limit_s: float
    start_s: float  # what it had to begin in
    timed_out: bool
    code: int


# Errors of the worker that are not the engine's fault.
_PASSED_ON: Mapping[str, type[DiffharnessError]] = {kind.__name__: kind for kind in (OutputError, FixtureError)}


def failure(
    ended: Ended, event: Mapping[str, Any] | None, words: Sequence[str], note: dict[str, Any]
) -> DiffharnessError:
    """What to raise for a worker that reported an error, or ended without an event; `note` is its heartbeat's."""
    phase, node = note.pop("phase", "start"), note
    if event is not None:
        return _reported(event, words, phase)
    if phase == "start" and (ended.timed_out or ended.code >= 0):
        return _not_begun(ended, words)
    return _died(ended, words, node, phase)


def _not_begun(ended: Ended, words: Sequence[str]) -> EngineCrash:
    """An interpreter that ended by itself, or never came to the worker's first step; no engine has run."""
    said = next((line for line in reversed(words) if line.strip()), "")
    found = _NO_MODULE.search(said)
    if found:
        what, hint = f"has no {found['name']}", f"{ended.python} -m pip install {found['name']}"
    else:
        limit_s, code = min(ended.limit_s, ended.start_s), ended.code
        ends = f"has not begun after {limit_s:g} s" if ended.timed_out else f"ends with exit code {code}"
        what = f"is no interpreter that can run the engine: it {ends}" + (f" and says {said!r}" if said else "")
        hint = "give a Python 3.10 or newer with llama-cpp-python"
    return EngineCrash(f"{ended.python} {what}", kind="refused", hint=hint, last_words=words[-12:])


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


def _died(ended: Ended, words: Sequence[str], node: Mapping[str, Any], phase: str) -> EngineCrash:
    """What became of a worker that ended without an event."""
    code = ended.code
    signal_name = _signal_name(-code) if code < 0 and not ended.timed_out else None
    kind: CrashKind
    if ended.timed_out:
        kind, what = "hang", f"the engine did not finish within {ended.limit_s:g} s"
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
