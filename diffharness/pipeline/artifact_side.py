"""What the artifact leg rests on: the reference on checkpoint and control, tensors and metadata compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffharness.engine.runner import Engine, EngineCrash
from diffharness.errors import OutputError
from diffharness.forensics.drift import tensor_errors
from diffharness.forensics.metadata import differences, repaired
from diffharness.legs import artifact as artifact_leg
from diffharness.legs.artifact import ArtifactInputs, ArtifactOutcome
from diffharness.metrics import compare_logits, nll_per_position, perplexity
from diffharness.pipeline import reference_runs
from diffharness.pipeline.inputs import Inputs
from diffharness.pipeline.reference_runs import Logits, Precision
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.timing import Timings
from diffharness.records import MetadataRow
from diffharness.reference import archs
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.source import Overlay, WeightSource

_REPAIRS = 4  # forwards spent on repaired keys; more differing keys are tried together only


@dataclass(frozen=True)
class ArtifactSide:
    """The leg, and the reference's logits by `checkpoint` and `control` (`artifact` where nobody had them)."""

    outcome: ArtifactOutcome
    logits: dict[str, Logits] = field(default_factory=dict)


def not_run(reason: str) -> ArtifactSide:
    return ArtifactSide(artifact_leg.not_run(reason))


def run_all(
    request: RunRequest,
    inputs: Inputs,
    checkpoint: Checkpoint,
    precision: Precision,
    folder: Path,
    timings: Timings,
    *,
    artifact_logits: Logits | None,
) -> ArtifactSide:
    """Forwards on checkpoint, artifact and control; every tensor and key compared; judged."""
    fixture, artifact = inputs.fixture, inputs.artifact
    model = archs.build(artifact.metadata)
    rows = fixture.scored_positions()
    floors = {name: request.tolerances[name] for name in request.tolerances.floors}
    with timings.step("control"):
        request.say("quantizing the checkpoint afresh to the artifact's types, as a control")
        control = make_control(artifact, checkpoint, request, folder)
    try:
        with timings.step("reference: checkpoint"):
            request.say("reference on the checkpoint")
            capture = reference_runs.captured(checkpoint, fixture, precision, folder / "reference-checkpoint.safetensors")
        theirs = capture.read("logits")
        with timings.step("reference: artifact"):
            request.say("reference on the artifact, on the checkpoint's layer inputs")
            ours, taps = reference_runs.against_capture(artifact, capture, fixture, precision)
        logits: dict[str, Logits] = {"checkpoint": theirs}
        if artifact_logits is None:
            logits["artifact"] = ours
        control_taps = control_logits = None
        if control is not None:
            with timings.step("reference: control"):
                request.say("reference on the control")
                logits["control"], control_taps = reference_runs.against_capture(control, capture, fixture, precision)
                control_logits = compare_logits(theirs, logits["control"], rows)
        with timings.step("tensors"):
            request.say("comparing tensors with the checkpoint's")
            drift = tensor_errors(artifact, checkpoint, control, floors)
        ppl = {name: _perplexity(of, inputs) for name, of in {**logits, "artifact": ours}.items()}
        metadata = differences(artifact.metadata, checkpoint.metadata, artifact.arch)
        with timings.step("repaired metadata"):
            _repair(metadata, artifact, inputs, precision)
        outcome = artifact_leg.judge(
            ArtifactInputs(
                kinds=[model.layer_kind(il) for il in range(model.n_layer)],
                metadata=metadata,
                drift=drift,
                logits=compare_logits(theirs, ours, rows),
                control_logits=control_logits,
                taps=taps,
                control_taps=control_taps,
                perplexity=ppl,
            ),
            floors,
        )
    finally:
        if control is not None:
            control.close()
        (folder / "control.gguf").unlink(missing_ok=True)
    return ArtifactSide(outcome, logits)


def make_control(artifact: GgufFile, checkpoint: Checkpoint, request: RunRequest, folder: Path) -> GgufFile | None:
    """The checkpoint with each tensor in the artifact's type, by ggml's own quantizer.

    None where the engine cannot make it (types that need an importance matrix, a build that dies); the
    tensors are then compared without a control.
    """
    plain, out = folder / "checkpoint.f32.gguf", folder / "control.gguf"
    types = {name: info.type for name, info in artifact.tensors.items() if name in checkpoint.tensors}
    try:
        checkpoint_to_gguf(checkpoint, plain)
        Engine(request.engine).quantize_like(plain, out, types)
        return open_gguf(out)
    except (EngineCrash, OutputError) as error:
        request.say(f"no control: {error.message}")
        return None
    finally:
        plain.unlink(missing_ok=True)


def _repair(rows: list[MetadataRow], artifact: WeightSource, inputs: Inputs, precision: Precision) -> None:
    """Perplexity of the artifact with each used key repaired alone, as far as `_REPAIRS` forwards go."""
    for row in [row for row in rows if row.used][:_REPAIRS]:
        source = Overlay(artifact, metadata=repaired(artifact.metadata, {row.key: row.checkpoint}))
        row.repaired_ppl = _perplexity(reference_runs.logits_of(source, inputs.fixture, precision), inputs)


def _perplexity(logits: Logits, inputs: Inputs) -> float:
    rows = inputs.fixture.scored_positions()
    return perplexity(nll_per_position(logits[rows], inputs.fixture.next_ids()))
