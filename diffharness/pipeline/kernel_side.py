"""The kernel leg within a run: the native engine's nodes; and where the graph leg fails, the strict engine's.

A wrong kernel makes the strict engine differ from the reference just as a wrong graph does. So where the graph leg
fails, the nodes of the strict run are replayed too: up to the first token that differs, in its own chunk. If every
layer that fails holds a node that is wrong for its own inputs, the kernel is accused and not the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffharness.engine.slicing import SlicedStrict
from diffharness.fixture import Fixture
from diffharness.legs import kernel as kernel_leg
from diffharness.legs.compare import logit_stats
from diffharness.legs.graph import GraphOutcome
from diffharness.legs.kernel import KernelOutcome
from diffharness.metrics import compare_logits
from diffharness.pipeline.engine_runs import EngineRuns
from diffharness.pipeline.replaying import Recording, replay_leg
from diffharness.pipeline.slice_replay import replay_slices
from diffharness.pipeline.strict_way import Chosen
from diffharness.pipeline.work import Work
from diffharness.records import Divergence, KernelLeg
from diffharness.taps import split
from diffharness.weights.gguf_file import open_gguf

_SWITCHED_OFF = "switched off"


@dataclass(frozen=True)
class KernelSide:
    """The leg, and the graph leg's outcome as the kernels leave it."""

    kernel: KernelOutcome
    graph: GraphOutcome

    @property
    def first_divergence(self) -> Divergence | None:
        first = self.kernel.first
        return None if first is None else Divergence(leg="kernel", tap=first.node, layer=first.layer, nmse=first.nmse)


def run_all(work: Work, engine: EngineRuns, graph: GraphOutcome, chosen: Chosen) -> KernelSide:
    """The native engine's first tokens replayed; the strict engine's, if the graph leg fails."""
    native = _native(work, engine)
    if graph.leg.status != "fail" or engine.strict is None or not work.request.kernel_tokens:
        return KernelSide(native, graph)
    strict = _strict(work, engine, graph, chosen)
    if strict.first is None:
        return KernelSide(native, graph)
    return KernelSide(joined(native, strict), attributed(graph, strict))


def run_native(work: Work, engine: EngineRuns, graph: GraphOutcome) -> KernelSide:
    """The native engine's first tokens replayed, beside a graph leg that did not run."""
    return KernelSide(_native(work, engine), graph)


def _native(work: Work, engine: EngineRuns) -> KernelOutcome:
    fixture, n = work.inputs.fixture, work.request.kernel_tokens
    if engine.native is None:
        return KernelOutcome(kernel_leg.numbers(None, reason=engine.reason))
    found = KernelOutcome(kernel_leg.numbers(None, reason=engine.reason if n else _SWITCHED_OFF))
    if n and engine.watched is not None:
        tokens = [int(token) for token in fixture.chunks()[0]]
        work.request.say(f"replaying the native engine's nodes on {min(n, len(tokens))} tokens")
        with work.timings.step("replay: native"):
            overrides = work.request.overrides
            recording = Recording(work.inputs.artifact, tokens, engine.watched, n_batch=n, overrides=overrides)
            found = replay_leg(recording, work.request.tolerances, work.request.say)
    return replace(found, leg=_with_numbers(found.leg, engine, fixture))


def _with_numbers(leg: KernelLeg, engine: EngineRuns, fixture: Fixture) -> KernelLeg:
    """The leg with native against strict, which judges nothing."""
    if engine.native is None or engine.strict is None:
        return leg
    strict, native = (run.open().read("logits") for run in (engine.strict, engine.native))
    numbers = logit_stats(compare_logits(strict, native, fixture.scored_positions()))
    return leg.model_copy(update={"logits": numbers})


def _strict(work: Work, engine: EngineRuns, graph: GraphOutcome, chosen: Chosen) -> KernelOutcome:
    assert engine.strict is not None, "asked for only with a strict run"
    assert engine.strict.capture is not None, "only a traced run has none"
    rows = _until(work.inputs.fixture, graph.first_divergence, work.request.kernel_tokens)
    work.request.say(f"the graph leg fails: replaying the strict engine's nodes on {rows.stop - rows.start} tokens")
    with work.timings.step("replay: strict"):
        if isinstance(chosen.model, SlicedStrict):
            return replay_slices(
                work, chosen.model, failing_layers(graph), engine.strict.settings, engine.strict.capture, rows
            )
        with open_gguf(chosen.model.path) as strict:
            tokens, overrides = [int(each) for each in work.inputs.fixture.ids[rows]], work.request.overrides
            recording = Recording(
                strict, tokens, engine.strict.settings, n_batch=len(tokens), n_single=0, overrides=overrides
            )
            return replay_leg(recording, work.request.tolerances, work.request.say)


def failing_layers(graph: GraphOutcome) -> set[int | None]:
    """Layers with a tap that fails; None outside of them."""
    return {split(row.tap)[0] for row in graph.leg.taps if row.ok is False}


def _until(fixture: Fixture, first: Divergence | None, at_least: int) -> slice:
    """The rows of the chunk in which the two sides part, up to that place."""
    token = first.token if first is not None and first.token is not None else 0
    start, end = next((start, end) for start, end in fixture.chunk_bounds() if start <= token < end)
    return slice(start, min(end, max(start + at_least, token + 1)))


def attributed(graph: GraphOutcome, strict: KernelOutcome) -> GraphOutcome:
    """The graph leg's outcome, acquitted where wrong kernels account for every layer that fails."""
    if strict.first is None or not failing_layers(graph) <= strict.layers:
        return graph
    why = f"a wrong kernel accounts for it: {strict.first.node} ({strict.first.op})"
    leg = graph.leg.model_copy(update={"reason": f"{graph.leg.reason}; {why}"})
    findings = [
        finding.model_copy(update={"kind": None, "message": f"strict engine and reference differ, and {why}"})
        if finding.kind == "engine.graph"
        else finding
        for finding in graph.findings
    ]
    return GraphOutcome(leg, graph.first_divergence, findings)


def joined(native: KernelOutcome, strict: KernelOutcome) -> KernelOutcome:
    """The native leg; a kernel that only the strict settings use is accused too."""
    if native.first is not None:
        return native
    told = [
        finding.model_copy(update={"message": f"under strict settings, {finding.message}"})
        for finding in strict.findings
    ]
    reason = "; ".join(part for part in (native.leg.reason, f"under strict settings: {strict.leg.reason}") if part)
    leg = native.leg.model_copy(update={"status": "fail", "reason": reason, "failing": strict.leg.failing})
    return KernelOutcome(leg, [*native.findings, *told], strict.first, strict.layers)
