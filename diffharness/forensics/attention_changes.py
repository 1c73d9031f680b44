"""Heads whose attention flattens or collapses in the artifact but not in the checkpoint, and what to say of them.

A head flattens where its relative entropy rises (to 1, uniform), and collapses where it falls (to 0, one key). What
quantization does by itself is seen on a control, the checkpoint quantized afresh: one head's change there is chance,
their root mean square is not. Two streams are judged: each model by itself (`own`), where a change may come from any
layer before, and each layer on the checkpoint's own input (`local`), where only its own weights can be behind it.
Without a control only the latter is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffharness.forensics.attention import AttentionStats, Float64Array
from diffharness.layers import describe_layers, describe_positions
from diffharness.records.attention import AttentionHealth, AttentionSide, HeadChange, Values
from diffharness.records.run import Finding
from diffharness.settings import Floors

How = Literal["flattened", "collapsed"]
Stream = Literal["own", "local"]

_WORDS: Mapping[How, str] = {"flattened": "tends to uniform", "collapsed": "collapses onto few keys"}
_CORE = 0.25  # a range counts for a sentence where this share of the most heads of any range changed


@dataclass(frozen=True)
class Streams:
    """One model's attention: by itself, and on the checkpoint's layer inputs."""

    own: AttentionStats
    local: AttentionStats


@dataclass(frozen=True)
class _Judged:
    """One stream's relative entropies, all [layer, head, range] or fit to be broadcast to it."""

    stream: Stream
    artifact: Float64Array
    control: Float64Array | None
    change: Float64Array
    limit: Float64Array

    def beyond(self, how: How) -> NDArray[np.bool_]:
        signed = self.change if how == "flattened" else -self.change
        return np.asarray(signed > self.limit)  # NaN is no change


def compare(
    checkpoint: AttentionStats,
    artifact: Streams,
    control: Streams | None,
    kinds: Sequence[str],
    landmarks: Mapping[str, int],
    floors: Floors,
) -> AttentionHealth:
    """Every side's numbers, the heads that changed, and one finding (information) for each way of changing.

    `kinds` by layer; `landmarks` are positions that mean something, as `layers.describe_positions` takes them.
    """
    streams = [_judge("local", checkpoint, artifact.local, control.local if control else None, floors)]
    if control is not None:
        streams.insert(0, _judge("own", checkpoint, artifact.own, control.own, floors))
    changed, findings = list[HeadChange](), list[Finding]()
    for how in _WORDS:
        heads = list(_heads(how, streams, checkpoint, kinds))
        changed += heads
        if heads:
            findings.append(_finding(how, heads, streams, checkpoint, kinds, landmarks))
    return AttentionHealth(
        kinds=list(kinds),
        ranges=list(checkpoint.ranges),
        checkpoint=_side(checkpoint),
        artifact=_side(artifact.own),
        control=None if control is None else _side(control.own),
        changed=sorted(changed, key=lambda head: (head.layer, head.head)),
        findings=findings,
    )


def _judge(
    stream: Stream, checkpoint: AttentionStats, artifact: AttentionStats, control: AttentionStats | None, floors: Floors
) -> _Judged:
    """The limit is a floor plus a factor times the control's root mean square change: the layer's or all layers'."""
    change = artifact.entropy - checkpoint.entropy
    if control is None:
        return _Judged(stream, artifact.entropy, None, change, np.array(floors["attention.entropy_alone"]))
    squares = np.square(control.entropy - checkpoint.entropy)
    layers = np.array([_mean(layer) for layer in squares])
    normal = np.sqrt(np.maximum(layers, _mean(squares)))[:, None, None]
    limit = floors["attention.entropy_floor"] + floors["attention.entropy_factor"] * normal
    return _Judged(stream, artifact.entropy, control.entropy, change, limit)


def _mean(values: Float64Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else 0.0


def _heads(
    how: How, streams: Sequence[_Judged], checkpoint: AttentionStats, kinds: Sequence[str]
) -> Iterable[HeadChange]:
    hits = {judged.stream: np.asarray(judged.beyond(how).any(axis=2)) for judged in streams}
    for layer, head in np.argwhere(np.logical_or.reduce(list(hits.values()))).tolist():
        told_by = [judged for judged in streams if hits[judged.stream][layer, head]]
        judged = told_by[0]
        over = np.where(judged.beyond(how), np.abs(judged.change) - judged.limit, -np.inf)[layer, head]
        i = int(np.argmax(over))
        start, stop = checkpoint.ranges[i]
        yield HeadChange(
            layer=layer,
            kind=kinds[layer],
            head=head,
            how=how,
            streams=[one.stream for one in told_by],
            start=start,
            stop=stop,
            checkpoint=checkpoint.entropy[layer, head, i],
            artifact=judged.artifact[layer, head, i],
            control=None if judged.control is None else judged.control[layer, head, i],
            limit=np.broadcast_to(judged.limit, judged.change.shape)[layer, head, i],
        )


# -- words --------------------------------------------------------------------------------------------


def _finding(
    how: How,
    heads: Sequence[HeadChange],
    streams: Sequence[_Judged],
    checkpoint: AttentionStats,
    kinds: Sequence[str],
    landmarks: Mapping[str, int],
) -> Finding:
    """`attention tends to uniform ...: only layers 8-20 (57 of their 117 heads), only positions >= 2048 (...)`."""
    by_own_weights = {head.layer for head in heads if "local" in head.streams}
    main = next(judged for judged in streams if judged.beyond(how).any())
    told = [head for head in heads if main.stream in head.streams]
    where = describe_layers({head.layer for head in told}, kinds)
    count = _count(len(told), checkpoint, {head.layer for head in told})
    positions = _positions(main.beyond(how), checkpoint, landmarks)
    parts = [f"attention {_WORDS[how]} in the artifact, not in the checkpoint: {where} ({count}), {positions}"]
    if main.stream == "local":
        parts[0] += ", with the checkpoint's layer inputs"
    parts.append(_most(max(told, key=lambda head: abs(head.artifact - head.checkpoint) - head.limit)))
    if main.stream == "own":
        parts.append(
            f"with the checkpoint's layer inputs {describe_layers(by_own_weights, kinds)}"
            if by_own_weights
            else "with the checkpoint's layer inputs no layer does: what comes before brings it on"
        )
    evidence = {
        "how": how,
        "layers": sorted({head.layer for head in told}),
        "layers_by_own_weights": sorted(by_own_weights),
        "heads": [[head.layer, head.head] for head in told],
        "worst": [head.model_dump() for head in sorted(told, key=lambda h: -abs(h.artifact - h.checkpoint))[:10]],
    }
    return Finding(kind=None, leg="artifact", message="; ".join(parts), evidence=evidence)


def _count(n: int, checkpoint: AttentionStats, layers: Iterable[int]) -> str:
    there = np.asarray(np.isfinite(checkpoint.entropy).any(axis=2))
    return f"{n} of their {int(there[list(layers)].sum())} heads"


def _positions(hit: NDArray[np.bool_], checkpoint: AttentionStats, landmarks: Mapping[str, int]) -> str:
    """Where most of the changes are, in words."""
    counts = hit.sum(axis=(0, 1))
    core = np.flatnonzero(counts >= max(1.0, _CORE * counts.max()))
    first, stop = checkpoint.ranges[core[0]][0], checkpoint.ranges[core[-1]][1]
    length = checkpoint.ranges[-1][1]
    if stop < length:
        return f"only positions {first}-{stop - 1} of {length}"
    return "at every position" if core[0] == 0 else describe_positions(first, length, landmarks)


def _most(head: HeadChange) -> str:
    control = "" if head.control is None else f", control {head.control:.2f}"
    return (
        f"most in layer {head.layer} head {head.head}, positions {head.start}-{head.stop - 1}: entropy "
        f"{head.artifact:.2f} of uniform's, checkpoint {head.checkpoint:.2f}{control}"
    )


def _side(stats: AttentionStats) -> AttentionSide:
    return AttentionSide(
        entropy=_plain(stats.entropy),
        first_share=_plain(stats.first_share),
        effective_keys=_plain(stats.effective_keys),
    )


def _plain(values: Float64Array) -> Values:
    return [[[None if np.isnan(x) else round(float(x), 5) for x in head] for head in layer] for layer in values]
