"""What each rule of a gate is read off: an inspection, a grading, the tokens leg. Pure; no limits here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from diffharness.records.grade import GradeRow, KlStatistics
from diffharness.records.inspect import InspectRecord, Measures, TensorMeasures
from diffharness.records.legs import TokensLeg
from diffharness.taps import split
from diffharness.words import listed

FEWEST_LAYERS = 3  # that make a median
LEAST_ERROR = 1e-3  # relative; an error below it counts as if it were this, as of tensors that are kept exactly
LEAST_KL = 1e-6  # nats; a control that loses less counts as if it lost this

Need = Literal["tensors", "forward", "tokens"]


@dataclass(frozen=True)
class NotRun:
    """Why there is nothing to judge."""

    reason: str


@dataclass(frozen=True)
class Reading:
    """One value that has a limit. `bits` per weight say which; `note` is for whoever reads that it is beyond it."""

    value: float
    what: str
    bits: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Evidence:
    """What was measured, or why it was not. The grading is against the checkpoint, with a control for `kl_control`.

    `bits` per weight are those of the matrices inside of the layers: of a small model's file, the embedding, which is
    kept in more bits, may be the most part.
    """

    inspection: InspectRecord | NotRun
    grade: GradeRow | NotRun
    tokens: TokensLeg | NotRun
    bits: float


Read = Callable[[Evidence], Sequence[Reading] | NotRun]


@dataclass(frozen=True)
class Kind:
    """One kind of rule: what it says of a value, and where that is read.

    `count` is for rules that count things: their readings are added up, and `what` is each thing counted.
    """

    says: str
    needs: Need
    read: Read
    bound: Literal["at_most", "at_least"] = "at_most"
    unit: str = ""
    by_bits: bool = False
    count: bool = False


# -- tensors and metadata -----------------------------------------------------------------------------


def _of_inspection(read: Callable[[InspectRecord], Sequence[Reading] | NotRun]) -> Read:
    def either(evidence: Evidence) -> Sequence[Reading] | NotRun:
        found = evidence.inspection
        return found if isinstance(found, NotRun) else read(found)

    return either


def _non_finite(found: InspectRecord) -> Sequence[Reading] | NotRun:
    if not found.tensors:
        return NotRun("no tensor was read")
    return [Reading(t.nan + t.inf, t.name, note=f"{t.nan} NaN, {t.inf} infinite") for t in found.tensors
            if t.nan or t.inf]  # fmt: skip


def _missing(found: InspectRecord) -> Sequence[Reading]:
    return [Reading(1, name) for name in found.missing]


def _metadata(found: InspectRecord) -> Sequence[Reading]:
    return [
        Reading(1, row.key, note=f"{_value(row.artifact)}, by the checkpoint {_value(row.checkpoint)}")
        for row in found.metadata
        if row.used
    ]


def _damage(found: InspectRecord) -> Sequence[Reading] | NotRun:
    drifted = [Reading(1, t.name, t.bpw, t.why or "") for t in found.tensors if t.drifted]
    unjudged = [t.name for t in found.tensors if t.limit is None and not t.drifted]
    if not drifted and (unjudged or not found.tensors):
        return NotRun(f"{len(unjudged)} of {len(found.tensors)} tensors have no control: {listed(unjudged, 5)}")
    return drifted


def _cosine(found: InspectRecord) -> Sequence[Reading] | NotRun:
    readings = [Reading(0.0 if t.artifact is None else t.artifact.cos, t.name, t.bpw, t.type) for t in found.tensors]
    return readings or NotRun("no tensor was compared")


def _uniform(found: InspectRecord) -> Sequence[Reading] | NotRun:
    groups: dict[tuple[str, str], list[TensorMeasures]] = defaultdict(list)
    for t in found.tensors:
        if t.layer is not None and t.artifact is not None:
            groups[split(t.name)[1], t.type].append(t)
    readings = [
        reading for group in groups.values() if len(group) >= FEWEST_LAYERS for reading in _against_median(group)
    ]
    return readings or NotRun(f"no class of tensors has {FEWEST_LAYERS} layers of one type")


def _against_median(group: Sequence[TensorMeasures]) -> list[Reading]:
    """Both ways: where most layers are damaged, it is the sound ones that are far from the median.

    What the control shows in the same place is divided out: some layers are harder to quantize than others.
    """
    errors = [_error(t.artifact) for t in group]
    controls = [_error(t.control) if t.control is not None else LEAST_ERROR for t in group]
    usual, usual_control = median(errors), median(controls)
    return [
        Reading(
            _apart(error, usual) / max(1.0, _apart(control, usual_control)),
            t.name,
            t.bpw,
            f"error {error:.2g}, median {usual:.2g}",
        )
        for t, error, control in zip(group, errors, controls, strict=True)
    ]


def _error(found: Measures | None) -> float:
    return math.inf if found is None else max(found.error, LEAST_ERROR)


def _apart(a: float, b: float) -> float:
    """The larger over the smaller; infinite if one of them is not finite."""
    return max(a, b) / min(a, b) if math.isfinite(a) and math.isfinite(b) else math.inf


# -- forwards -----------------------------------------------------------------------------------------


def _of_statistics(read: Callable[[KlStatistics, float], Reading]) -> Read:
    def either(evidence: Evidence) -> Sequence[Reading] | NotRun:
        row = evidence.grade
        if isinstance(row, NotRun):
            return row
        if row.statistics is None:
            return NotRun(row.error or "there are no logits of the checkpoint to compare with")
        return [read(row.statistics, evidence.bits)]

    return either


def _perplexity(found: KlStatistics, bits: float) -> Reading:
    by, error = _percent(found.ratio.value), found.ratio.error
    told = f"{by:+.2f}" + (f" ± {100 * error:.2g}" if error is not None else "")
    note = f"perplexity {found.ppl.value:.4f}, the checkpoint's {found.ppl_base.value:.4f} ({told} %)"
    return Reading(by, note, bits)


def _kl(found: KlStatistics, bits: float) -> Reading:
    error = f" ± {found.kl.error:.1e}" if found.kl.error is not None else ""
    return Reading(found.kl.value, f"mean of {found.n} positions{error}", bits)


def _kl_control(evidence: Evidence) -> Sequence[Reading] | NotRun:
    row = evidence.grade
    if isinstance(row, NotRun):
        return row
    if row.statistics is None or row.control is None:
        return NotRun(row.error or row.control_error or "there is no control")
    own, control = row.statistics, row.control.statistics
    # A mean alone can be one position, so that the median has to be beyond the limit as well.
    ratios = (
        own.kl.value / max(control.kl.value, LEAST_KL),
        own.kl_quantiles["50%"] / max(control.kl_quantiles["50%"], LEAST_KL),
    )
    told = f"mean KL {own.kl.value:.1e}, the control's {control.kl.value:.1e}"
    return [Reading(math.nan if any(map(math.isnan, ratios)) else min(ratios), told)]


def _engine(evidence: Evidence) -> Sequence[Reading] | NotRun:
    row = evidence.grade
    if isinstance(row, NotRun):
        return row
    if row.ppl is None or row.engine is None:
        return NotRun(row.error or "llama.cpp was not run")
    if row.engine.ppl is None:
        return [Reading(math.inf, f"llama.cpp does not run it: {row.engine.error or 'no reason given'}")]
    theirs, own = row.engine.ppl.value, row.ppl.value
    value = abs(_percent(theirs / own)) if math.isfinite(own) else math.inf
    return [Reading(value, f"perplexity {theirs:.4f} by llama.cpp, {own:.4f} by the reference")]


def _tokens(evidence: Evidence) -> Sequence[Reading] | NotRun:
    leg = evidence.tokens
    if isinstance(leg, NotRun):
        return leg
    if leg.status == "not_run":
        return NotRun(leg.reason or "the tokenizers were not compared")
    return [Reading(1, leg.reason or "the tokenizers disagree")] if leg.status == "fail" else []


KINDS: Mapping[str, Kind] = {
    "finite": Kind("values that are NaN or infinite", "tensors", _of_inspection(_non_finite), count=True),
    "complete": Kind("tensors that only the checkpoint has", "tensors", _of_inspection(_missing), count=True),
    "metadata": Kind("keys that are read and differ from the checkpoint's", "tensors", _of_inspection(_metadata),
                     count=True),
    "tokens": Kind("places where the tokenizers part", "tokens", _tokens, count=True),
    "damage": Kind("tensors further from the checkpoint than a fresh quantization explains", "tensors",
                   _of_inspection(_damage), count=True),
    "cosine": Kind("cosine of a tensor with the checkpoint's", "tensors", _of_inspection(_cosine), "at_least",
                   by_bits=True),
    "uniform": Kind("error of a tensor against the median of its class and type, the larger over the smaller",
                    "tensors", _of_inspection(_uniform), by_bits=True),
    "perplexity": Kind("perplexity above the checkpoint's", "forward", _of_statistics(_perplexity), unit="%",
                       by_bits=True),
    "kl": Kind("mean KL from the checkpoint in nats", "forward", _of_statistics(_kl), by_bits=True),
    "kl_control": Kind("KL over that of a fresh quantization to the same types", "forward", _kl_control),
    "engine": Kind("llama.cpp's perplexity off the reference's", "forward", _engine, unit="%"),
}  # fmt: skip


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def _value(value: object) -> str:
    return "missing" if value is None else str(value)
