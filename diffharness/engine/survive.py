"""After a crash: which node it was, and the nearest settings that survive, found by trying.

Settings are tried from the nearest to the furthest, first on a short piece of the text, then on all
of it; the first that survives gives the capture that the other legs go on with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffharness.engine.models import Chunk, Chunks, EngineModel, OneFile
from diffharness.engine.runner import EngineCrash, EngineRun
from diffharness.settings import PLAIN_KV, EngineSettings

# What to change, nearest first: one thing at a time, combinations last.
VARIANTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("extra buffers off", {"extra_bufts": False}),
    ("flash attention off", {"flash_attn": "off"}),
    ("one thread", {"threads": 1}),
    ("n_ubatch 64", {"n_ubatch": 64}),
    ("KV cache F16", {"type_k": "F16", "type_v": "F16"}),
    ("KV cache F32", {"type_k": "F32", "type_v": "F32"}),
    ("mmap off", {"use_mmap": False}),
    ("no GPU", {"n_gpu_layers": 0, "op_offload": False}),
    ("extra buffers and flash attention off", {"extra_bufts": False, "flash_attn": "off"}),
    (
        "all of these",
        {
            "extra_bufts": False,
            "flash_attn": "off",
            "type_k": "F16",
            "type_v": "F16",
            "threads": 1,
            "n_ubatch": 64,
            "use_mmap": False,
            "n_gpu_layers": 0,
            "op_offload": False,
        },
    ),
)
PREFIX_TOKENS = 64
_PREFIX_LIMIT_S = 300.0  # a hang must not cost the whole limit at every attempt


@dataclass(frozen=True)
class Attempt:
    """Settings that were tried; `outcome` is `survived`, or how they ended."""

    label: str
    changes: dict[str, Any]
    outcome: str


@dataclass(frozen=True)
class Survival:
    """What was found out after a crash."""

    node: dict[str, Any]  # the node that was begun, with op, types and shapes; empty if none was
    traced: EngineCrash | None  # the crash as tracing saw it; None if tracing made it go away
    settings: EngineSettings | None  # None if nothing survived
    run: EngineRun | None  # the whole job under these settings
    tried: list[Attempt] = field(default_factory=list)

    @property
    def label(self) -> str | None:
        """What was changed, in words; None if nothing survived."""
        return self.tried[-1].label if self.run is not None else None


def survive(
    crash: EngineCrash,
    settings: EngineSettings,
    model: str | os.PathLike[str] | EngineModel,
    chunks: Chunks,
    out: str | os.PathLike[str],
    *,
    taps: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    meta: Mapping[str, str] | None = None,
) -> Survival:
    """Name the node of `crash` by running again node by node, then look for settings under which the job ends well.

    A file that is refused is refused under any settings, and a library that dies in loading dies under any; then only
    the crash is returned.
    """
    if crash.is_unusable:
        return Survival(node={}, traced=None, settings=None, run=None)
    model = OneFile(Path(model)) if isinstance(model, (str, os.PathLike)) else model
    traced = _trace(settings, model, chunks, out, overrides)
    node = traced.node if traced is not None and traced.node else crash.node
    tried: list[Attempt] = []
    for label, changes in VARIANTS:
        candidate = settings.changed(**_fitting(settings, changes))
        differences = settings.differences(candidate)
        if not differences or any(attempt.changes == differences for attempt in tried):
            continue
        try:
            _try_prefix(candidate, model, chunks[0], Path(out), taps, overrides)
            run = model.capture(candidate, chunks, out, taps=taps, overrides=overrides, meta=meta)
        except EngineCrash as again:
            tried.append(Attempt(label, differences, again.signal_name or again.kind))
            continue
        tried.append(Attempt(label, differences, "survived"))
        return Survival(node=node, traced=traced, settings=candidate, run=run, tried=tried)
    return Survival(node=node, traced=traced, settings=None, run=None, tried=tried)


def _fitting(settings: EngineSettings, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes as these settings can take them: batches only shrink, and a quantized V needs flash attention."""
    fitted = dict(changes)
    if "n_ubatch" in fitted:
        fitted["n_ubatch"] = min(fitted["n_ubatch"], settings.n_ubatch)
    if fitted.get("flash_attn") == "off" and settings.type_v not in PLAIN_KV:
        fitted.setdefault("type_v", "F16")
    return fitted


def _try_prefix(
    settings: EngineSettings,
    model: EngineModel,
    chunk: Chunk,
    out: Path,
    taps: Sequence[str] | None,
    overrides: Sequence[str],
) -> None:
    quick = settings.changed(time_limit_s=min(settings.time_limit_s, _PREFIX_LIMIT_S))
    path = out.with_name(out.name + ".prefix")
    try:
        model.capture(quick, [chunk[:PREFIX_TOKENS]], path, taps=taps, overrides=overrides)
    finally:
        path.unlink(missing_ok=True)


def _trace(
    settings: EngineSettings,
    model: EngineModel,
    chunks: Chunks,
    out: str | os.PathLike[str],
    overrides: Sequence[str],
) -> EngineCrash | None:
    try:
        model.capture(settings, chunks, out, overrides=overrides, trace=True)
    except EngineCrash as crash:
        return crash
    return None
