"""`grade`: many artifacts on one fixture, against one base, in one table.

The base (checkpoint, or another artifact) runs through the reference once; each artifact through the reference and, as
a user would run it, through llama.cpp. A control is the checkpoint quantized afresh to the artifact's types.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffharness import kld
from diffharness.captures import Capture
from diffharness.engine.quantizer import Quantizer
from diffharness.engine.runner import Engine, EngineCrash
from diffharness.errors import EngineError
from diffharness.forensics.control import Control
from diffharness.forensics.loss import beyond_control, growth
from diffharness.kld import Series
from diffharness.layers import buckets
from diffharness.metrics import Float64Array
from diffharness.paired import paired
from diffharness.pipeline import grade_bf16, logit_series
from diffharness.pipeline.attention import Baseline
from diffharness.pipeline.folder import run_folder
from diffharness.pipeline.grade_bf16 import Bf16Precision
from diffharness.pipeline.grade_inputs import GradeInputs, GradeRequest, open_all
from diffharness.pipeline.logit_series import Places
from diffharness.pipeline.reference_runs import Precision, shape_of
from diffharness.pipeline.subjects import checkpoint_subject, engine_subject, fixture_subject, machine_subject
from diffharness.pipeline.timing import Timings
from diffharness.records.grade import (
    BaseRow,
    Bf16Noise,
    EngineGrade,
    GradeRecord,
    GradeRow,
    Paired,
    PairRow,
    PositionBucket,
)
from diffharness.records.run import Finding
from diffharness.records.subject import EngineSubject
from diffharness.reference import archs
from diffharness.settings import Floors
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import GgufFile
from diffharness.weights.source import WeightSource

_WINDOW = "attention.sliding_window"

Types = tuple[tuple[str, str], ...]  # tensor and type, for each tensor


@dataclass
class _Run:
    """One grading under way: what every step has at hand, and what several artifacts share."""

    request: GradeRequest
    inputs: GradeInputs
    folder: Path
    timings: Timings
    landmarks: Mapping[str, int]
    places: Places
    base: Capture | None = None
    noise: Bf16Noise | None = None
    series: dict[str, Series] = field(default_factory=dict)  # at the scored positions, by label
    engine: EngineSubject | None = None
    controls: dict[Types, Series] = field(default_factory=dict)

    @property
    def precision(self) -> Precision:
        return Precision(self.request.dtype, self.request.device)

    @property
    def products(self) -> Precision:
        """Of the forwards whose logits are compared."""
        return Bf16Precision(device=self.request.device) if self.request.matmul == "bf16" else self.precision

    def scored(self, series: Series) -> Series:
        return series.at(self.places.scored)

    def curve(self, series: Series) -> list[PositionBucket]:
        longest = max(map(len, self.inputs.fixture.chunks()))
        return kld.by_position(series, self.places.positions, buckets(longest, self.landmarks.values()))

    def reference(self, source: WeightSource) -> Series:
        return logit_series.of_reference(source, self.inputs.fixture, self.places, self.products, self.base)


def grade(request: GradeRequest) -> GradeRecord:
    """The whole table.

    Raises BadInputError where nothing can be graded at all: no artifact that can be read, an unfit checkpoint,
    fixture or setting. With `request.out` the folder keeps the base's logits.
    """
    timings = Timings()
    with timings.step("total"), contextlib.ExitStack() as stack:
        with timings.step("open"):
            inputs = open_all(request, stack)
        leading = next(one.artifact for one in inputs.candidates if one.artifact is not None)
        shape = shape_of(archs.build(leading.metadata), inputs.fixture, request.engine.n_ubatch)
        folder = stack.enter_context(run_folder(request.out))
        run = _Run(request, inputs, folder, timings, shape.landmarks, Places.of(inputs.fixture))
        record = _record(run, stack)
    record.timings = timings.seconds
    return record


def has_errors(record: GradeRecord) -> bool:
    """Whether an artifact could not be graded."""
    return any(row.error is not None for row in record.rows)


def is_beyond(record: GradeRecord) -> bool:
    """Whether an artifact lost more than its control allows."""
    return any(row.control is not None and row.control.beyond for row in record.rows)


def _record(run: _Run, stack: contextlib.ExitStack) -> GradeRecord:
    request, inputs = run.request, run.inputs
    base = None if inputs.base is None else _run_base(run, inputs.base)
    quantizer = baseline = None
    if request.with_control or request.with_attention:
        quantizer = stack.enter_context(Quantizer(request.engine))
    if request.with_attention and inputs.base is not None:
        request.say(f"attention of {inputs.base.label}")
        with run.timings.step("attention"):
            n_ubatch = request.engine.n_ubatch
            baseline = stack.enter_context(Baseline(inputs.base, inputs.fixture, run.precision, n_ubatch=n_ubatch))
    run.noise = _noise(run)
    for one in inputs.candidates:
        if one.artifact is None:
            continue
        _measure(run, one.row, one.artifact)
        if quantizer is None or inputs.base is None:
            continue
        control = Control(inputs.base, one.artifact, quantizer.quantize)
        if request.with_control:
            _add_control(run, one.row, control)
        if baseline is not None:
            _add_attention(run, one.row, one.artifact, baseline, control)
    rows = [one.row for one in inputs.candidates]
    return GradeRecord(
        base=base,
        bf16=run.noise,
        rows=rows,
        pairs=_pairs(run),
        landmarks=dict(run.landmarks),
        unreached=_unreached(run),
        findings=[*inputs.findings, *_findings(rows, request.tolerances, run.noise)],
        checkpoint=checkpoint_subject(request.checkpoint, inputs.base)
        if request.checkpoint is not None and isinstance(inputs.base, Checkpoint)
        else None,
        fixture=fixture_subject(inputs.fixture),
        engine=run.engine,
        machine=machine_subject(),
        repro=request.repro,
    )


# -- forwards -----------------------------------------------------------------------------------------


def _run_base(run: _Run, source: Checkpoint | GgufFile) -> BaseRow:
    run.request.say(f"reference on {source.label}")
    with run.timings.step("reference: base"):
        path = run.folder / "reference-base.safetensors"
        run.base, series = logit_series.of_base(source, run.inputs.fixture, run.places, run.products, path)
    return BaseRow(
        label=source.label,
        kind="checkpoint" if isinstance(source, Checkpoint) else "artifact",
        ppl=kld.perplexity(run.scored(series).nll),
        positions=run.curve(series),
    )


def _noise(run: _Run) -> Bf16Noise | None:
    """Of products in bfloat16, where those are asked for."""
    if not isinstance(run.products, Bf16Precision):
        return None
    source = run.inputs.base or next(one.artifact for one in run.inputs.candidates if one.artifact is not None)
    run.request.say(f"noise of bfloat16 on {source.label}")
    with run.timings.step("bf16 noise"):
        return grade_bf16.measured(source, run.inputs.fixture, run.products, run.base)


def _measure(run: _Run, row: GradeRow, artifact: GgufFile) -> None:
    run.request.say(f"reference on {row.label}")
    with run.timings.step("reference"):
        series = run.reference(artifact)
    scored = run.series[row.label] = run.scored(series)
    row.ppl, row.positions = kld.perplexity(scored.nll), run.curve(series)
    if scored.has_base:
        row.statistics = kld.statistics(scored)
    if run.request.with_engine:
        run.request.say(f"llama.cpp on {row.label}")
        with run.timings.step("engine"):
            row.engine = _run_engine(run, artifact)
    if run.noise is not None:
        grade_bf16.mark(row, run.noise)


def _run_engine(run: _Run, artifact: GgufFile) -> EngineGrade:
    """llama.cpp's own numbers; where it dies, how it died."""
    request, out = run.request, run.folder / "engine-native.safetensors"
    try:
        done = Engine(request.engine).capture(
            artifact.paths[0], run.inputs.fixture.chunks(), out, taps=(), overrides=request.overrides
        )
        series = logit_series.of_capture(done.open(), run.places, run.base)
    except EngineCrash as crash:
        return EngineGrade(error=crash.message)
    finally:
        out.unlink(missing_ok=True)
    run.engine = run.engine or engine_subject(done.settings, done.info, request.overrides)
    scored = run.scored(series)
    return EngineGrade(
        ppl=kld.perplexity(scored.nll),
        kl=kld.mean(scored.kl) if scored.has_base else None,
        positions=run.curve(series),
    )


def _add_control(run: _Run, row: GradeRow, control: Control) -> None:
    """The same numbers of the checkpoint in the artifact's types; a forward for each set of types."""
    assert row.statistics is not None, "asked for only with a checkpoint"
    types = tuple(sorted((name, info.type) for name, info in control.tensors.items()))
    if types not in run.controls:
        run.request.say(f"reference on {control.label}")
        try:
            with run.timings.step("reference: control"):
                run.controls[types] = run.reference(control)
        except EngineError as error:
            row.control_error = error.message
            return
    series = run.controls[types]
    row.control = beyond_control(row.statistics, kld.statistics(run.scored(series)), run.request.tolerances)
    row.control.positions = run.curve(series)


def _add_attention(run: _Run, row: GradeRow, artifact: GgufFile, baseline: Baseline, control: Control) -> None:
    """How attention is spread, beside the base's and the control's: two forwards without the output head."""
    run.request.say(f"attention of {row.label}")
    with run.timings.step("attention"):
        beside = None
        try:
            beside = baseline.beside(control)
        except EngineError as error:
            row.control_error = error.message
        row.attention = baseline.judge(baseline.beside(artifact), beside, run.request.tolerances)


# -- comparing ----------------------------------------------------------------------------------------


def _pairs(run: _Run) -> list[PairRow]:
    chunk_of = run.places.chunk_of[run.places.scored]

    def compared(x: Float64Array, y: Float64Array) -> Paired:
        found = paired(x, y, chunk_of)
        return found if run.noise is None else grade_bf16.marked(found, run.noise)

    return [
        PairRow(a=a, b=b, nll=compared(x.nll, y.nll), kl=compared(x.kl, y.kl) if x.has_base else None)
        for (a, x), (b, y) in itertools.combinations(run.series.items(), 2)
    ]


def _findings(rows: Sequence[GradeRow], floors: Floors, noise: Bf16Noise | None) -> list[Finding]:
    factor, floor = floors["grade.position_factor"], floors["artifact.kl_floor"]
    if noise is not None:
        floor = max(floor, noise.limit)
    curves = [(row.label, row.positions) for row in rows]
    curves += [(f"{row.label} in llama.cpp", row.engine.positions) for row in rows if row.engine is not None]
    told = [(label, growth(curve, factor, floor)) for label, curve in curves]
    return [Finding(kind=None, leg=None, message=f"{label}: {text}") for label, text in told if text is not None]


def _unreached(run: _Run) -> dict[str, int]:
    """Window and n_ubatch that no chunk is longer than: what only breaks beyond them does not show."""
    places = {"n_ubatch": run.request.engine.n_ubatch} if run.request.with_engine else {}
    for one in run.inputs.candidates:
        window = None if one.artifact is None else one.artifact.metadata.get(f"{one.artifact.arch}.{_WINDOW}")
        if isinstance(window, int) and window > 0:
            places["the window"] = window
    return {name: at for name, at in places.items() if name not in run.landmarks}


# -- subjects -----------------------------------------------------------------------------------------
