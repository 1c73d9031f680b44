"""What the artifact leg rests on: the reference on checkpoint and control, tensors and metadata compared."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffharness.engine.runner import NEED_IMPORTANCE, Engine, EngineCrash
from diffharness.errors import OutputError
from diffharness.forensics.drift import tensor_errors
from diffharness.forensics.metadata import differences, repaired
from diffharness.legs import artifact as artifact_leg
from diffharness.legs.artifact import ArtifactInputs, ArtifactOutcome
from diffharness.metrics import compare_logits, nll_per_position, perplexity
from diffharness.pipeline import reference_runs
from diffharness.pipeline.inputs import Inputs
from diffharness.pipeline.reference_runs import Logits, Precision
from diffharness.pipeline.work import Work
from diffharness.records import MetadataRow
from diffharness.reference import archs
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.source import Overlay, WeightSource

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
    with step("control"):
        say("quantizing the checkpoint afresh to the artifact's types, as a control")
        control = make_control(work, checkpoint)
    try:
        with step("reference: checkpoint"):
            say("reference on the checkpoint")
            path = work.folder / "reference-checkpoint.safetensors"
            capture = reference_runs.captured(checkpoint, fixture, precision, path)
        theirs = capture.read("logits")
        with step("reference: artifact"):
            say("reference on the artifact, on the checkpoint's layer inputs")
            ours, taps = reference_runs.against_capture(artifact, capture, fixture, precision)
        logits: dict[str, Logits] = {"checkpoint": theirs}
        if artifact_logits is None:
            logits["artifact"] = ours
        control_taps = control_logits = None
        if control is not None:
            with step("reference: control"):
                say("reference on the control")
                logits["control"], control_taps = reference_runs.against_capture(control, capture, fixture, precision)
                control_logits = compare_logits(theirs, logits["control"], rows)
        with step("tensors"):
            say("comparing tensors with the checkpoint's")
            drift = tensor_errors(artifact, checkpoint, control, work.floors)
        longest = max(map(len, fixture.chunks()))
        metadata = differences(artifact.metadata, checkpoint.metadata, artifact.arch, n_tokens=longest)
        with step("repaired metadata"):
            _repair(metadata, artifact, work.inputs, precision)
    finally:
        if control is not None:
            control.close()
        (work.folder / "control.gguf").unlink(missing_ok=True)
    model = archs.build(artifact.metadata)
    inputs = ArtifactInputs(
        kinds=[model.layer_kind(il) for il in range(model.n_layer)],
        metadata=metadata,
        drift=drift,
        logits=compare_logits(theirs, ours, rows),
        control_logits=control_logits,
        taps=taps,
        control_taps=control_taps,
        perplexity={name: _perplexity(of, work.inputs) for name, of in {**logits, "artifact": ours}.items()},
    )
    return ArtifactSide(artifact_leg.judge(inputs, work.floors), logits)


def make_control(work: Work, checkpoint: Checkpoint) -> GgufFile | None:
    """The checkpoint with each tensor in the artifact's type, by ggml's own quantizer.

    None where the engine cannot make it (types it does not know, a build that dies); the tensors are then
    compared without a control. No importance matrix is at hand, so that every weight is as important.
    """
    plain, out = work.folder / "checkpoint.f32.gguf", work.folder / "control.gguf"
    shared = {name: info for name, info in work.inputs.artifact.tensors.items() if name in checkpoint.tensors}
    types = {name: info.type for name, info in shared.items()}
    uniform = {
        name: info.shape[-1] * (info.shape[0] if len(info.shape) > 2 else 1)
        for name, info in shared.items()
        if info.type in NEED_IMPORTANCE
    }
    try:
        checkpoint_to_gguf(checkpoint, plain)
        Engine(work.request.engine).quantize_like(plain, out, types, uniform)
        return open_gguf(out)
    except (EngineCrash, OutputError) as error:
        work.request.say(f"no control: {error.message}")
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
