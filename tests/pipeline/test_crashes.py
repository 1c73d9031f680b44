"""Which ends of an engine accuse it: a death over the model does, a build that does not even load says nothing."""

from __future__ import annotations

import pytest

from diffharness.engine.crash import CrashKind, EngineCrash
from diffharness.pipeline.crashes import crash_finding, same_refusal
from diffharness.records import Finding


@pytest.mark.parametrize(
    ("kind", "phase", "verdict", "says"),
    [
        ("signal", "eval", "engine.crash", "the engine died (native)"),
        ("hang", "load", "engine.crash", "the engine died (native)"),
        ("refused", "load", "inconclusive", "the engine refuses the artifact (native)"),
        ("refused", "import", "inconclusive", "the engine cannot be used (native)"),
        ("refused", "start", "inconclusive", "the engine cannot be used (native)"),
        ("signal", "import", "inconclusive", "the engine cannot be used (native)"),
        ("exit", "import", "inconclusive", "the engine cannot be used (native)"),
    ],
)
def test_what_an_end_says(kind: CrashKind, phase: str, verdict: str, says: str) -> None:
    found = crash_finding("native", EngineCrash("told so", kind=kind, phase=phase))
    assert found.kind == verdict and found.message.startswith(says) and "told so" in found.message


def refused(what: str, message: str) -> Finding:
    return crash_finding(what, EngineCrash(message, kind="refused", phase="load"))


def test_one_refusal_of_two_runs_is_one() -> None:
    strict = refused("strict, callback on", "llama.cpp does not load /tmp/x/strict.gguf: invalid n_rot: 16")
    native = refused("native, callback off", "llama.cpp does not load /models/a.gguf: invalid n_rot: 16")
    assert same_refusal(strict, native)
    assert strict.next_step is not None and "--engine" in strict.next_step


def test_other_reasons_and_deaths_are_told_each() -> None:
    one = refused("strict, callback on", "llama.cpp does not load /tmp/strict.gguf: invalid n_rot: 16")
    other = refused("native, callback off", "llama.cpp does not load /tmp/a.gguf: invalid n_rot: 32")
    assert not same_refusal(one, other)
    died = [crash_finding(what, EngineCrash("x", kind="signal", phase="eval")) for what in ("strict", "native")]
    assert not same_refusal(*died)
