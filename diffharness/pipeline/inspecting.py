"""`inspect`: every tensor of a file against the checkpoint's, without a forward.

Each file is read once, tensor by tensor; the control is made on the way, so that nothing is written and no more than
the tensors of one name are in memory.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffharness.engine.quantizer import Quantizer
from diffharness.errors import ArtifactFileError
from diffharness.forensics import classes
from diffharness.forensics.control import Control
from diffharness.forensics.drift import TensorError, tensor_errors
from diffharness.forensics.heads import Heads
from diffharness.forensics.inspection import Inspected, conclude, drifted, tensor_rows
from diffharness.forensics.measures import Gauge, Measured, bins, measure
from diffharness.forensics.metadata import account
from diffharness.forensics.patterns import find_patterns
from diffharness.forensics.relations import find_relations
from diffharness.pipeline.pairs import Pair, open_pair, special_tokens
from diffharness.pipeline.request import Say
from diffharness.pipeline.subjects import artifact_subject, checkpoint_subject, machine_subject
from diffharness.pipeline.timing import Timings
from diffharness.records import Subject
from diffharness.records.inspect import InspectRecord, PatternRow
from diffharness.reference import archs
from diffharness.settings import EngineSettings, Tolerances
from diffharness.taps import split
from diffharness.weights.gguf_file import GgufFile
from diffharness.weights.source import Float32Array, TensorInfo, WeightSource
from diffharness.words import counted

Watch = Callable[[int, int], None]  # values compared so far, of how many


@dataclass(frozen=True)
class InspectRequest:
    """One inspection. `engine` makes the control; `watch` is told how far it is."""

    model: Path
    checkpoint: Path
    engine: EngineSettings
    tolerances: Tolerances
    repro: str = ""
    say: Say = field(default=lambda text: None, repr=False)
    watch: Watch = field(default=lambda done, total: None, repr=False)


def inspect(request: InspectRequest) -> InspectRecord:
    """Compare, look for patterns, conclude.

    Raises ArtifactFileError for what is no GGUF, CheckpointError for a checkpoint that is unfit or of another model,
    EngineError where ggml's quantizer dies.
    """
    timings = Timings()
    with timings.step("total"):
        with timings.step("open"):
            pair = open_pair(request.model, request.checkpoint)
        try:
            record = _inspected(request, pair, timings)
        finally:
            pair.close()
    record.timings = timings.seconds
    return record


def _inspected(request: InspectRequest, pair: Pair, timings: Timings) -> InspectRecord:
    floors = request.tolerances
    observer = Observer(pair, request.watch)
    with timings.step("tensors"), Quantizer(request.engine) as quantizer:
        request.say(f"comparing {counted(len(pair.artifact.tensors), 'tensor')} with the checkpoint's")
        control = Control(pair.checkpoint, pair.artifact, quantizer.quantize)
        drift = tensor_errors(
            pair.artifact, pair.checkpoint, control, floors, on_tensor=observer.rows, on_sample=observer.sample
        )
    observer.finish()
    measured = observer.measured
    kinds = layer_kinds(pair)
    with timings.step("patterns"):
        damaged = [*drifted(drift, measured, floors), *(t for t in drift.tensors if t.non_finite)]
        places, relations = patterns_of(pair.file, pair.artifact, pair.checkpoint, damaged, drift.tensors, kinds)
    with timings.step("metadata"):
        metadata = account(
            pair.file.metadata, pair.checkpoint.metadata, pair.file.arch, special=special_tokens(pair.checkpoint)
        )
    inspected = Inspected(
        drift=drift,
        measured=measured,
        bpw={name: 8 * info.n_bytes / max(1, info.n_elements) for name, info in pair.file.tensors.items()},
        places=places,
        relations=relations,
        metadata=metadata,
        ignored=[*pair.checkpoint.ignored, *pair.checkpoint.extra],
        surplus=pair.surplus,
        no_control=next((t.no_control for t in drift.tensors if t.no_control), None),
    )
    rows = tensor_rows(inspected, floors)
    verdict, findings = conclude(inspected, floors, restore=_restore(request))
    return InspectRecord(
        verdict=verdict,
        subject=_subject(request, pair),
        totals=classes.totals(rows),
        patterns=[*relations, *places],
        tensors=rows,
        classes=classes.by_class(rows),
        layers=classes.by_layer(rows),
        grid=classes.grid(rows),
        layer_kinds=kinds,
        metadata=metadata,
        missing=drift.missing,
        extra=drift.extra,
        ignored=list(inspected.ignored),
        control="the checkpoint's tensors quantized afresh to the artifact's types by ggml, without importance weights",
        bins=bins(),
        findings=findings,
        repro=request.repro,
    )


class Observer:
    """Measures what `tensor_errors` reads: every run of rows, and of a large tensor's control the rows it makes."""

    def __init__(self, pair: Pair, watch: Watch = lambda done, total: None) -> None:
        self.measured: dict[str, Measured] = {}
        self._name, self._gauge = "", Gauge("F32", (0,), with_control=False)
        self._watch, self._done = watch, 0
        shared = [info for name, info in pair.artifact.tensors.items() if name in pair.checkpoint.tensors]
        self._total = sum(info.n_elements for info in shared)

    def rows(self, name: str, info: TensorInfo, a: Float32Array, b: Float32Array, c: Float32Array | None) -> None:
        """The next rows; those of one tensor come one after the other."""
        if name != self._name:
            self.finish()
            self._name, self._gauge = name, Gauge(info.type, info.shape, with_control=c is not None)
        self._gauge.feed(a, b, c)
        self._done += a.size
        self._watch(min(self._done, self._total), self._total)

    def sample(self, name: str, info: TensorInfo, a: Float32Array, b: Float32Array, c: Float32Array | None) -> None:
        """Rows spread over the tensor, with a control that its other rows lack."""
        self.finish()
        self.measured[name] = replace(self.measured[name], control=measure(a, b, c, info.type).control)

    def finish(self) -> None:
        """Conclude the tensor that is under way."""
        if self._name:
            self.measured[self._name] = self._gauge.finish()
            self._name = ""


def layer_kinds(pair: Pair) -> list[str]:
    """What the architecture calls each layer, by the checkpoint's metadata; all alike where the reference has none."""
    try:
        model = archs.build(pair.checkpoint.metadata)
    except ArtifactFileError:  # a form of the architecture that only a forward would need to know
        return plain_kinds(pair.checkpoint.tensors)
    return [model.layer_kind(il) for il in range(model.n_layer)]


def plain_kinds(tensors: Iterable[str]) -> list[str]:
    """`layer` for each layer that has tensors of these names, where nobody knows more of them."""
    layers = [split(name)[0] for name in tensors]
    return ["layer"] * (1 + max((il for il in layers if il is not None), default=-1))


def patterns_of(
    file: GgufFile,
    artifact: WeightSource,
    checkpoint: WeightSource,
    damaged: Sequence[TensorError],
    every: Sequence[TensorError],
    kinds: Sequence[str],
) -> tuple[list[PatternRow], list[PatternRow]]:
    """Where the damaged tensors are, and what became of them."""
    if not damaged:
        return [], []
    places = find_patterns(damaged, every, kinds, shard_of=shard_of(file), hyper=Heads.of(checkpoint.metadata))
    return places, find_relations(damaged, artifact, checkpoint, every, kinds)


def shard_of(file: GgufFile) -> Callable[[str], int] | None:
    """The number of the shard that a tensor is in; None for a file that is whole."""
    if len(file.paths) < 2:
        return None
    numbers = {path: i for i, path in enumerate(file.paths)}
    return lambda name: numbers[file.tensor_offset(name)[0]] if name in file.tensors else 0


def _restore(request: InspectRequest) -> str:
    return f"diffharness restore {shlex.quote(str(request.model))} --checkpoint {shlex.quote(str(request.checkpoint))}"


def _subject(request: InspectRequest, pair: Pair) -> Subject:
    """Without hashes: they would read both files a second time."""
    return Subject(
        artifact=artifact_subject(request.model, pair.file, hashed=False),
        checkpoint=checkpoint_subject(request.checkpoint, pair.checkpoint, hashed=False),
        machine=machine_subject(),
    )
