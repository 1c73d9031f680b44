"""Artifact and checkpoint mixed in any proportion, scored by the reference: each mixture once, from where it differs.

A mixture is the artifact with some tensors and metadata keys of the checkpoint. Those that are equal on both sides
make no difference, so that mixtures which differ in nothing else are one. Of a few mixtures the activations are kept
(`reference.prefix`): of the artifact, of the checkpoint, and of the last ones made. A forward starts at the first layer
in which its mixture differs from one of these.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffharness.captures import Capture, CaptureWriter
from diffharness.fixture import Fixture
from diffharness.forensics.groups import Group
from diffharness.forensics.metadata import repaired
from diffharness.forensics.restore import Outcome
from diffharness.metrics import kl_per_position, nll_per_position
from diffharness.pipeline.mixed_sources import Exchanged, untied
from diffharness.pipeline.reference_runs import Precision
from diffharness.reference.prefix import Prefix
from diffharness.reference.runner import Reference
from diffharness.taps import split
from diffharness.weights.source import EMBEDDING, HEAD, Float32Array, WeightSource

_ONLY_HEAD = (HEAD, "output_norm.weight")
_KEPT = 4  # mixtures whose activations are kept beside the artifact's and the checkpoint's
_SHARE_OF_DISK = 0.5  # of what is free, for activations

Signature = tuple[frozenset[str], ...]  # what comes from the checkpoint: before the layers, in each of them


@dataclass
class Count:
    """Forwards made, and the layers that they ran through."""

    forwards: int = 0
    layers: int = 0


class Mixtures:
    """Outcomes of mixtures. The first forward is the checkpoint's, whose logits the others are compared with.

    `equal` are tensors with the same values on both sides. `told` is called before each forward with the number of
    forwards made so far.
    """

    def __init__(
        self,
        artifact: WeightSource,
        checkpoint: WeightSource,
        fixture: Fixture,
        precision: Precision,
        folder: Path,
        *,
        keys: Mapping[str, Any],
        equal: frozenset[str] = frozenset(),
        told: Callable[[int], None] = lambda n: None,
        reuse: bool = True,
    ) -> None:
        self.artifact, self.checkpoint = untied(artifact, checkpoint)
        self.names = frozenset({*self.artifact.tensors, *self.checkpoint.tensors})
        self.everything = Group("everything", self.names, frozenset(keys))
        self.equal, self.count = equal, Count()
        self._fixture, self._precision, self._folder = fixture, precision, folder
        self._keys, self._told = dict(keys), told
        self._outcomes: dict[tuple[frozenset[str], frozenset[str]], Outcome] = {}
        self._kept: list[tuple[Signature, Prefix]] = []
        self._n_layer = 1 + max((split(name)[0] or 0 for name in self.names), default=0)
        self._reuse = reuse and self._fits()
        self._base: Capture | None = None
        self.of(self.everything)

    def towards(self, artifact: WeightSource) -> Mixtures:
        """The same with another source in the artifact's place; what is known of the checkpoint is known there."""
        other = copy.copy(self)
        other.artifact = artifact
        at_checkpoint = self._place(self.everything)
        other._outcomes = {at_checkpoint: self._outcomes[at_checkpoint]}
        everything = self._signature(*at_checkpoint)
        other._kept = [(signature, prefix) for signature, prefix in self._kept if signature == everything]
        return other

    def of(self, taken: Group) -> Outcome:
        """The artifact with the group's tensors and keys as the checkpoint has them."""
        tensors, keys = self._place(taken)
        found = self._outcomes.get((tensors, keys))
        if found is None:
            metadata = repaired(self.artifact.metadata, {key: self._keys[key] for key in keys})
            source = Exchanged(self.artifact, self.checkpoint, tensors, metadata)
            found = self._outcomes[tensors, keys] = self._forward(source, self._signature(tensors, keys))
        return found

    def without(self, put_in: Group) -> Outcome:
        """The checkpoint with the group's tensors and keys as the artifact has them."""
        everything = self.everything
        return self.of(Group("", everything.tensors - put_in.tensors, everything.keys - put_in.keys))

    def of_source(self, source: WeightSource) -> Outcome:
        """Another source, such as the control."""
        return self._forward(source, None)

    def is_known(self, taken: Group) -> bool:
        """Whether `of` needs no forward."""
        return self._place(taken) in self._outcomes

    def _place(self, taken: Group) -> tuple[frozenset[str], frozenset[str]]:
        """What the group changes: the same for all groups that make the same mixture."""
        return (taken.tensors & self.names) - self.equal, taken.keys & frozenset(self._keys)

    # -- one forward -----------------------------------------------------------------------------------

    def _forward(self, source: WeightSource, signature: Signature | None) -> Outcome:
        self._told(self.count.forwards)
        reference = Reference(source, dtype=self._precision.dtype, device=self._precision.device)
        prefix = self._prefix(signature) if signature is not None and self._reuse else None
        start = (prefix.end if prefix is not None else None) or 0
        score = self._write_base if self._base is None else self._score
        outcome = score(reference, prefix)
        if prefix is not None and signature is not None:
            self._keep(signature, prefix)
        self.count.forwards += 1
        self.count.layers += self._n_layer - start
        return outcome

    def _write_base(self, reference: Reference, prefix: Prefix | None) -> Outcome:
        rows = self._fixture.scored_positions()
        path = self._folder / "restore-checkpoint.safetensors"
        with CaptureWriter(path, len(rows)) as writer:

            def on_tap(tap: str, own: Tensor, _: Tensor | None, at: slice) -> None:
                first, last = np.searchsorted(rows, [at.start, at.stop])
                writer.write("logits", int(first), _array(own)[rows[first:last] - at.start])

            reference.run(self._fixture.chunks(), on_tap=on_tap, taps=["logits"], keep_logits=False, prefix=prefix)
            writer.finish()
        self._base = Capture(path)
        nll = nll_per_position(self._base.read("logits"), self._fixture.next_ids())
        return Outcome(nll, np.zeros_like(nll))

    def _score(self, reference: Reference, prefix: Prefix | None) -> Outcome:
        assert self._base is not None, "the checkpoint's forward comes first"
        rows, next_ids, base = self._fixture.scored_positions(), self._fixture.next_ids(), self._base.read("logits")
        nll, kl = np.empty(len(rows)), np.empty(len(rows))

        def on_tap(tap: str, own: Tensor, _: Tensor | None, at: slice) -> None:
            first, last = np.searchsorted(rows, [at.start, at.stop])
            if first == last:
                return
            logits, part = _array(own)[rows[first:last] - at.start], slice(int(first), int(last))
            nll[part] = nll_per_position(logits, next_ids[part])
            kl[part] = kl_per_position(base[part], logits)

        reference.run(self._fixture.chunks(), on_tap=on_tap, taps=["logits"], keep_logits=False, prefix=prefix)
        return Outcome(nll, kl)

    # -- activations -----------------------------------------------------------------------------------

    def _signature(self, tensors: frozenset[str], keys: frozenset[str]) -> Signature:
        stages: list[set[str]] = [set(keys), *(set() for _ in range(self._n_layer))]
        for name in tensors:
            layer = split(name)[0]
            if layer is not None:
                stages[layer + 1].add(name)
            elif name not in _ONLY_HEAD:
                stages[0].add(name)  # whatever lies outside of the layers may be read by all of them
        return tuple(map(frozenset, stages))

    def _prefix(self, signature: Signature) -> Prefix:
        """A branch of the kept prefix that goes furthest; an empty one where none begins alike."""
        best, stages = None, 0
        for other, prefix in self._kept:
            alike = next((i for i, (a, b) in enumerate(zip(signature, other, strict=True)) if a != b), len(signature))
            if alike > stages:
                best, stages = prefix, alike
        return Prefix(self._folder) if best is None else best.branch(stages - 1)

    def _keep(self, signature: Signature, prefix: Prefix) -> None:
        self._kept.append((signature, prefix))
        nothing = self._signature(frozenset(), frozenset())
        everything = self._signature(self.names - self.equal, frozenset(self._keys))
        others = [item for item in self._kept if item[0] not in (nothing, everything)]
        if len(others) > _KEPT:
            self._kept.remove(others[0])

    def _fits(self) -> bool:
        """Whether there is room for every prefix that may be kept, at its largest."""
        value = 8 if self._precision.dtype == "float64" else 4
        width = self.artifact.tensors[EMBEDDING].shape[-1]
        n_bytes = self._fixture.n_tokens * width * value * (self._n_layer + 1) * (_KEPT + 3)
        return n_bytes <= _SHARE_OF_DISK * shutil.disk_usage(self._folder).free


def _array(value: Tensor) -> Float32Array:
    return value.detach().cpu().numpy().astype(np.float32, copy=False)
