"""The native run's error taken apart: rounding that honest kernels do too, each layer's own part, and what is neither.

Three passes of the reference: one over the whole fixture that rounds as the engine does, for the drift to expect; and
two over the first tokens of the native run with all its taps, as defined and rounding, for local errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffharness.captures import Capture
from diffharness.engine.runner import Engine, EngineCrash, EngineRun
from diffharness.legs import activations, native, noise, router
from diffharness.legs.compare import TapComparison, unmatched
from diffharness.metrics import kl_per_position, nmse
from diffharness.pipeline.engine_runs import EngineRuns
from diffharness.pipeline.reference_runs import (
    GraphRuns,
    Logits,
    Precision,
    choice_of,
    conventions_of,
    experts_used,
    layer_inputs,
    logits_of,
)
from diffharness.pipeline.work import Work
from diffharness.records import Finding, Status
from diffharness.records.noise import Drift, NoiseReport
from diffharness.reference.model import DEFINITION, Arithmetic, KvCache
from diffharness.reference.runner import Reference
from diffharness.settings import PLAIN_KV, EngineSettings
from diffharness.taps import layer_tap, split
from diffharness.weights.source import IntArray, WeightSource

LOCAL_TOKENS = 64  # from which on flash attention on the CPU goes tile by tile, as it does for any longer batch
_CHUNK_TOKENS = 1024  # of a chunk at most, where the first value that is not finite is looked for


@dataclass(frozen=True)
class NoiseOutcome:
    report: NoiseReport
    findings: list[Finding]


def judge_noise(
    work: Work,
    engine: EngineRuns,
    graph_runs: GraphRuns | None,
    precision: Precision,
    *,
    graph: Status,
    kernel: Status,
) -> NoiseOutcome:
    """The report, and what it finds given how the graph and the kernel leg ended."""
    if engine.native is None:
        return NoiseOutcome(NoiseReport(reason=engine.reason or "the native engine did not run"), [])
    arithmetic, reason = simulation(work.inputs.artifact, engine.native)
    report = NoiseReport(reason=reason, simulated=list(arithmetic.conventions))
    native_logits = engine.native.open().read("logits")
    with work.timings.step("reference: noise"):
        work.request.say("reference with the engine's rounding: the drift to expect, and each layer's own part")
        if reason is None:
            run = engine.native.settings
            report.drift = _drift(work, run, native_logits, graph_runs, arithmetic, precision)
        chunks = work.inputs.fixture.chunks()
        report.first_row, chunks = _tokens(chunks, activations.first_non_finite_row(native_logits))
        capture = _capture(work, engine.native, chunks)
        if isinstance(capture, str):
            report.reason = report.reason or capture
        else:
            _local(work, report, capture, chunks, arithmetic, precision)
    return NoiseOutcome(report, noise.findings(report, graph=graph, kernel=kernel, model=str(work.request.model)))


def simulation(source: WeightSource, run: EngineRun) -> tuple[Arithmetic, str | None]:
    """The reference's arithmetic that rounds as this run does, and why there is none, if so."""
    settings = run.settings
    cache = KvCache(settings.type_k, settings.type_v, flash=settings.flash_attn != "off")
    arithmetic = replace(conventions_of(source), rounded_activations=True, kv_cache=cache)
    other = _other_device(settings, run.info)
    if other is not None:
        return DEFINITION, f"rounding is simulated for ggml's CPU backend, not for {other}"
    if not {settings.type_k, settings.type_v} <= set(PLAIN_KV):
        return DEFINITION, f"rounding is not simulated for a KV cache of {settings.type_k} and {settings.type_v}"
    return arithmetic, None


def _other_device(settings: EngineSettings, info: dict[str, Any]) -> str | None:
    """A device other than the CPU that may have computed something."""
    others = [str(device) for device in info.get("devices", []) if not str(device).startswith("CPU")]
    used = settings.n_gpu_layers != 0 or settings.op_offload or any(device.startswith("BLAS") for device in others)
    return others[0] if others and used else None


def _drift(
    work: Work,
    run: EngineSettings,
    native: Logits,
    graph_runs: GraphRuns | None,
    arithmetic: Arithmetic,
    precision: Precision,
) -> Drift:
    source, fixture = work.inputs.artifact, work.inputs.fixture
    defined = logits_of(source, fixture, precision) if graph_runs is None else graph_runs.logits
    simulated = logits_of(source, fixture, precision, arithmetic)
    positions = np.concatenate([np.arange(len(chunk)) for chunk in fixture.chunks()])
    rows, simulated_all = simulated_rows(fixture.chunks(), fixture.scored_positions(), run)
    routed = bool(experts_used(source))
    return noise.drift(
        defined, simulated, native, rows, positions, work.floors, simulated_all=simulated_all, routed=routed
    )


def simulated_rows(chunks: list[IntArray], scored: IntArray, run: EngineSettings) -> tuple[IntArray, bool]:
    """The scored rows whose rounding is simulated; all of them, and False, where there are none.

    Flash attention on few tokens sums values of type F16 in float16, which the reference does not.
    """
    if run.flash_attn == "off" or run.type_v != "F16":
        return scored, True
    pieces = [
        np.full(min(run.n_ubatch, len(chunk) - start), min(run.n_ubatch, len(chunk) - start))
        for chunk in chunks
        for start in range(0, len(chunk), run.n_ubatch)
    ]
    kept = scored[np.concatenate(pieces)[scored] >= LOCAL_TOKENS]
    return (kept, True) if kept.size else (scored, False)


# -- the native run with all its taps ------------------------------------------------------------------


def _tokens(chunks: list[IntArray], broken: int | None) -> tuple[int, list[IntArray]]:
    """The fixture's first tokens; if logits are not finite from row `broken` on, the tokens of its chunk up to it.

    The first one's row in the fixture, and the tokens as chunks.
    """
    first = 0
    for chunk in chunks:
        if broken is not None and LOCAL_TOKENS <= broken < first + len(chunk) and broken - first < _CHUNK_TOKENS:
            return first, [chunk[: max(LOCAL_TOKENS, broken - first + 1)]]
        first += len(chunk)
    kept, room = list[IntArray](), LOCAL_TOKENS
    for chunk in chunks:
        if room <= 0:
            break
        kept.append(chunk[:room])
        room -= len(kept[-1])
    return 0, kept


def _capture(work: Work, run: EngineRun, chunks: list[IntArray]) -> Capture | str:
    """Every tap of the native engine under the settings that it ran with; words if it dies this time."""
    out = work.folder / "engine-native-taps.safetensors"
    try:
        model = work.inputs.artifact.paths[0]
        taken = Engine(run.settings).capture(model, chunks, out, overrides=work.request.overrides)
    except EngineCrash as crash:
        return f"the native engine with all its taps died: {crash.message}"
    return taken.open()


# -- local errors --------------------------------------------------------------------------------------


def _local(
    work: Work,
    report: NoiseReport,
    capture: Capture,
    chunks: list[IntArray],
    arithmetic: Arithmetic,
    precision: Precision,
) -> None:
    """Fill in what the native run's taps tell."""
    report.tokens = capture.n_tokens
    report.non_finite = activations.first_non_finite(capture)
    report.large = activations.large(capture, work.floors["noise.float16_share"])
    if report.reason is not None:
        return
    source = work.inputs.artifact
    defined = _Pass(capture)
    defined.run(source, chunks, DEFINITION, precision)
    rounding = _Pass(capture, against=defined)
    rounding.run(source, chunks, arithmetic, precision)
    model = Reference(source).model
    kinds = [model.layer_kind(il) for il in range(model.n_layer)]
    report.unmatched = unmatched(capture.taps, defined.seen).reference
    report.layers = native.layers(defined.compared, rounding.compared, kinds, rounding.drifted, work.floors)
    choice = choice_of(source)
    if choice is not None:
        kl = kl_per_position(defined.outputs["logits"], capture.read("logits"))
        routed = {il: capture.read(tap) for il in defined.routed if (tap := layer_tap(il, "moe_logits")) in capture}
        report.router = router.flips(defined.routed, routed, rounding.routed, choice, kl)


@dataclass
class _Pass:
    """One pass of the reference, its second stream set back to the engine's value at every tap."""

    capture: Capture
    against: _Pass | None = None  # the pass from which this one's own stream drifts
    compared: TapComparison = field(init=False)
    seen: dict[str, None] = field(default_factory=dict)
    outputs: dict[str, Logits] = field(default_factory=dict)  # own values of what layers hand on, and of the logits
    drifted: dict[str, float] = field(default_factory=dict)  # NMSE of the own values from those of `against`
    routed: dict[int, Logits] = field(default_factory=dict)  # own router logits by layer

    def __post_init__(self) -> None:
        self.compared = TapComparison(self.capture.n_tokens)

    def run(self, source: WeightSource, chunks: list[IntArray], arithmetic: Arithmetic, precision: Precision) -> None:
        reference = Reference(source, dtype=precision.dtype, device=precision.device, arithmetic=arithmetic)
        reference.run(chunks, engine_inputs=layer_inputs(self.capture), on_tap=self._on_tap, keep_logits=False)
        if self.against is not None:
            earlier = self.against.outputs
            self.drifted = {tap: nmse(values, earlier[tap]) for tap, values in self.outputs.items()}

    def _on_tap(self, tap: str, own: Tensor, local: Tensor | None, rows: slice) -> None:
        self.seen[tap] = None
        self._keep(tap, own, rows)
        if tap not in self.capture:
            return
        engine = np.array(self.capture.read(tap)[rows])
        self.compared.feed(tap, rows.start, engine, _array(own), None if local is None else _array(local))
        if local is not None:
            local.copy_(torch.from_numpy(engine))

    def _keep(self, tap: str, own: Tensor, rows: slice) -> None:
        layer, name = split(tap)
        if name in ("token_embd", "layer_out", "logits"):
            _put(self.outputs, tap, own, rows, self.capture.n_tokens)
        elif name == "moe_logits" and layer is not None:
            _put(self.routed, layer, own, rows, self.capture.n_tokens)


def _put(into: dict[Any, Logits], key: object, own: Tensor, rows: slice, n_tokens: int) -> None:
    if key not in into:
        into[key] = np.zeros((n_tokens, own.shape[1]), dtype=np.float32)
    into[key][rows] = _array(own)


def _array(value: Tensor) -> NDArray[np.floating[Any]]:
    return value.detach().cpu().numpy()
