"""What the artifact leg rests on: the reference on checkpoint and control, tensors and metadata compared."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace

from diffharness.engine.quantizer import Quantizer
from diffharness.errors import EngineError
from diffharness.forensics.control import Control
from diffharness.forensics.drift import tensor_errors
from diffharness.forensics.metadata import differences, repaired
from diffharness.forensics.restore import is_too_short
from diffharness.legs import artifact as artifact_leg
from diffharness.legs.artifact import ArtifactInputs, ArtifactOutcome
from diffharness.metrics import compare_logits, nll_per_position, perplexity
from diffharness.paired import paired
from diffharness.pipeline import reference_runs
from diffharness.pipeline.attention import Watching, judged
from diffharness.pipeline.exchanging import exchange_of
from diffharness.pipeline.folder import run_folder
from diffharness.pipeline.inputs import Inputs
from diffharness.pipeline.inspecting import patterns_of, plain_kinds
from diffharness.pipeline.reference_runs import Logits, Precision, shape_of
from diffharness.pipeline.work import Work
from diffharness.records import MetadataRow
from diffharness.reference import archs
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.source import Overlay, WeightSource

_ENOUGH = 2048  # tokens that tell another model from damage
_REPAIRS = 4  # keys that are repaired, a forward each; of further ones no perplexity is given


@dataclass(frozen=True)
class ArtifactSide:
    """The leg, and the reference's logits by `checkpoint` and `control` (`artifact` where nobody had them)."""

    outcome: ArtifactOutcome
    logits: dict[str, Logits] = field(default_factory=dict)


def not_run(reason: str) -> ArtifactSide:
    return ArtifactSide(artifact_leg.not_run(reason))


def run_all(work: Work, checkpoint: Checkpoint, precision: Precision, artifact_logits: Logits | None) -> ArtifactSide:
    """Forwards on checkpoint, artifact and control; every tensor and key compared; judged."""
    fixture, artifact = work.inputs.fixture, work.inputs.artifact
    say, step = work.request.say, work.timings.step
    rows = fixture.scored_positions()
    shape = shape_of(archs.build(artifact.metadata), fixture, work.request.engine.n_ubatch)
    watched = {name: Watching(shape) for name in ("checkpoint", "artifact", "control")}
    with Quantizer(work.request.engine) as quantizer:
        control = Control(checkpoint, artifact, quantizer.quantize)
        with step("reference: checkpoint"):
            say("reference on the checkpoint")
            path = work.folder / "reference-checkpoint.safetensors"
            capture = reference_runs.captured(checkpoint, fixture, precision, path, on_attention=watched["checkpoint"])
        theirs = capture.read("logits")
        with step("reference: artifact"):
            say("reference on the artifact, on the checkpoint's layer inputs")
            ours, taps = reference_runs.against_capture(
                artifact, capture, fixture, precision, on_attention=watched["artifact"]
            )
        logits: dict[str, Logits] = {"checkpoint": theirs}
        if artifact_logits is None:
            logits["artifact"] = ours
        control_taps = control_logits = None
        with step("reference: control"):
            say("reference on the control: the checkpoint quantized afresh to the artifact's types")
            try:
                logits["control"], control_taps = reference_runs.against_capture(
                    control, capture, fixture, precision, on_attention=watched["control"]
                )
                control_logits = compare_logits(theirs, logits["control"], rows)
            except EngineError as error:  # a type that it does not make, or a build that dies
                say(f"no control: {error.message}")
        with step("tensors"):
            say("comparing tensors with the checkpoint's")
            drift = tensor_errors(artifact, checkpoint, control, work.floors)
        longest = max(map(len, fixture.chunks()))
        metadata = differences(artifact.metadata, checkpoint.metadata, artifact.arch, n_tokens=longest)
        with step("repaired metadata"):
            _repair(metadata, artifact, work.inputs, precision)
        with step("patterns"):
            damaged = [t for t in drift.tensors if t.damaged and not t.non_finite]
            places, relations = patterns_of(artifact, artifact, checkpoint, damaged, drift.tensors, shape.kinds)
        inputs = ArtifactInputs(
            kinds=shape.kinds,
            metadata=metadata,
            drift=drift,
            places=places,
            relations=relations,
            logits=compare_logits(theirs, ours, rows),
            control_logits=control_logits,
            taps=taps,
            control_taps=control_taps,
            perplexity={name: _perplexity(of, work.inputs) for name, of in {**logits, "artifact": ours}.items()},
        )
        if artifact_leg.may_be_other_model(inputs, work.floors):
            with step("lineage"):
                say("parts exchanged with the checkpoint: another model, or this one damaged?")
                inputs = _with_lineage(work, checkpoint, control, precision, inputs, theirs, ours)
    outcome = artifact_leg.judge(inputs, work.floors)
    for finding in outcome.findings:
        if finding.kind == "inconclusive":
            model, folder = shlex.quote(str(work.request.model)), shlex.quote(str(work.request.checkpoint))
            finding.next_step = f"diffharness run {model} --checkpoint {folder} --tokens {_ENOUGH}"
    beside = watched["control"] if control_taps is not None else None
    outcome.findings.extend(judged(watched["checkpoint"], watched["artifact"], beside, shape, work.floors).findings)
    return ArtifactSide(outcome, logits)


def without_forward(work: Work, checkpoint: Checkpoint) -> ArtifactSide:
    """Every tensor and key compared, where the reference cannot compute the model."""
    artifact = work.inputs.artifact
    with Quantizer(work.request.engine) as quantizer, work.timings.step("tensors"):
        work.request.say("comparing tensors with the checkpoint's")
        control = Control(checkpoint, artifact, quantizer.quantize)
        drift = tensor_errors(artifact, checkpoint, control, work.floors)
    kinds = plain_kinds(checkpoint.tensors)
    longest = max(map(len, work.inputs.fixture.chunks()))
    damaged = [t for t in drift.tensors if t.damaged and not t.non_finite]
    places, relations = patterns_of(artifact, artifact, checkpoint, damaged, drift.tensors, kinds)
    inputs = ArtifactInputs(
        kinds=kinds,
        metadata=differences(artifact.metadata, checkpoint.metadata, artifact.arch, n_tokens=longest),
        drift=drift,
        places=places,
        relations=relations,
    )
    return ArtifactSide(artifact_leg.judge(inputs, work.floors))


def _with_lineage(
    work: Work,
    checkpoint: Checkpoint,
    control: Control,
    precision: Precision,
    inputs: ArtifactInputs,
    theirs: Logits,
    ours: Logits,
) -> ArtifactInputs:
    """With what tells another model from damage; on too few positions nothing does."""
    fixture, floors = work.inputs.fixture, work.floors
    rows, next_ids = fixture.scored_positions(), fixture.next_ids()
    own, other = (nll_per_position(logits[rows], next_ids) for logits in (ours, theirs))
    if is_too_short(paired(own, other, rows // fixture.chunk)):
        return replace(inputs, too_short=True)
    assert inputs.drift is not None, "asked for only with the tensors compared"
    with run_folder(None) as folder:
        exchange = exchange_of(
            work.inputs.artifact, checkpoint, inputs.drift, inputs.metadata, fixture, precision, folder, floors,
            work.request.say,
        )  # fmt: skip
        outcome = exchange.control(None if inputs.control_logits is None else control)
        return replace(inputs, lineage=exchange.lineage(outcome))


def _repair(rows: list[MetadataRow], artifact: WeightSource, inputs: Inputs, precision: Precision) -> None:
    """Perplexity of the artifact with each used key repaired alone, as far as `_REPAIRS` forwards go."""
    for row in [row for row in rows if row.used][:_REPAIRS]:
        source = Overlay(artifact, metadata=repaired(artifact.metadata, {row.key: row.checkpoint}))
        row.repaired_ppl = _perplexity(reference_runs.logits_of(source, inputs.fixture, precision), inputs)


def _perplexity(logits: Logits, inputs: Inputs) -> float:
    rows = inputs.fixture.scored_positions()
    return perplexity(nll_per_position(logits[rows], inputs.fixture.next_ids()))
