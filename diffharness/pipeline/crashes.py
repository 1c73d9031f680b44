"""An engine that died or refused: as a finding, and as the reason why something did not run."""

from __future__ import annotations

import re

from diffharness.engine.runner import EngineCrash
from diffharness.engine.survive import Survival
from diffharness.records import Finding

# Words that differ between runs that are refused alike: which of them it was, and whose file (the strict has its own).
_WHICH_RUN = re.compile(r"\([^()]*callback (on|off)\)|\S*[/\\]\S+")
_OTHER_BUILD = "try another build of llama.cpp: --engine FOLDER"


def crash_reason(what: str, crash: EngineCrash) -> str:
    """Why there is nothing of `what`, in one sentence."""
    return f"the engine {_ended(crash)} ({what}): {crash.message}"


def _ended(crash: EngineCrash) -> str:
    if crash.phase in ("start", "import"):
        return "cannot be used"
    return "refuses the artifact" if crash.is_unusable else "died"


def crash_finding(what: str, crash: EngineCrash, found: Survival | None = None) -> Finding:
    """`what` the engine was doing; `found` is what is known of its node and of settings that survive."""
    if crash.is_unusable:
        # Not a death over the model: the engine says no, or does not even load, and another build may say yes.
        message = crash_reason(what, crash)
        # A checkpoint, the usual next step, would decide nothing.
        step = crash.hint or ("diffharness doctor" if crash.phase in ("start", "import") else _OTHER_BUILD)
        return Finding(kind="inconclusive", leg=None, message=message, evidence=crash.as_dict(), next_step=step)
    node = found.node if found is not None else crash.node
    at = f" in node {node.get('node')} ({node.get('op')})" if node else ""
    label = found.label if found is not None else None
    tried = found.tried if found is not None else []
    cure = f"; it survives with {label}" if label else "; no settings that were tried survive" if tried else ""
    return Finding(
        kind="engine.crash",
        leg=None,
        message=f"the engine died ({what}){at}: {crash.message}{cure}",
        evidence={
            **crash.as_dict(),
            "node": dict(node) or None,
            "survives": label,
            "tried": [{"label": a.label, "changes": a.changes, "outcome": a.outcome} for a in tried],
        },
    )


def same_refusal(one: Finding, other: Finding) -> bool:
    """Whether two runs of an engine were refused for one reason, which is told once."""
    messages = (_WHICH_RUN.sub("", finding.message) for finding in (one, other))
    return one.kind == other.kind == "inconclusive" and len(set(messages)) == 1
