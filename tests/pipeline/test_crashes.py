"""Which ends of an engine accuse it: a death over the model does, a build that does not even load says nothing."""

from __future__ import annotations

import pytest

from diffharness.engine.crash import CrashKind, EngineCrash
from diffharness.pipeline.crashes import crash_finding


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
