"""Composed damage: what was on record of real files, made of the other faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffharness.damage.draft import Draft, Edit, Fault, Plan, Target
from diffharness.damage.values import decibels_of_cosine
from diffharness.errors import BadInputError
from diffharness.taps import split

PERIOD, SPARED = 6, (0, 1)  # of unsloth #6056
DRIFTED, OF_ATTENTION = 29, 21  # tensors of the report on attention drift


@dataclass(frozen=True)
class Step:
    """A fault on some tensors."""

    fault: str
    names: Sequence[str]
    strength: float


def merged(draft: Draft, steps: Sequence[Step], faults: Mapping[str, Fault]) -> Edit:
    """All steps, one after the other, as one edit; steps without tensors are left out."""
    total = Edit()
    for step in steps:
        if not step.names:
            continue
        edit = faults[step.fault].plan(draft, Target(step.fault, step.names, step.strength))
        draft = replace(draft, contents={**draft.contents, **edit.contents})
        total = Edit({**total.contents, **edit.contents}, {**total.said, **edit.said})
    return total


def presets(faults: Mapping[str, Fault]) -> list[Fault]:
    """The composed faults over the simple ones."""
    return [
        Fault("issue-6056", f"as Gemma 4 12B files in unsloth #6056: layer scalars 1, matrices of the layers that are "
              f"not {' or '.join(map(str, SPARED))} mod {PERIOD} mixed with noise",
              "a period of layers", _issue_6056(faults), "blk.*", 0.45,
              "cosine to clean", (1e-3, 0.999999)),
        Fault("attention-drift", f"as reported of a Gemma 4 quant: noise on {DRIFTED} matrices, {OF_ATTENTION} of them "
              "attention's queries, keys and values", "classes of attention", _attention_drift(faults),
              "blk.*", 3.0, "SQNR in dB"),
    ]  # fmt: skip


def _issue_6056(faults: Mapping[str, Fault]) -> Plan:
    def plan(draft: Draft, target: Target) -> Edit:
        scalars = [name for name in target.names if name.endswith("layer_output_scale.weight")]
        mixed = [
            name
            for name in target.names
            if _is_matrix(draft, name) and (split(name)[0] or 0) % PERIOD not in SPARED and split(name)[0] is not None
        ]
        steps = [Step("constant", scalars, 1.0), Step("noise", mixed, decibels_of_cosine(target.strength))]
        return merged(draft, steps, faults) if scalars or mixed else _nothing(target)

    return plan


def _attention_drift(faults: Mapping[str, Fault]) -> Plan:
    def plan(draft: Draft, target: Target) -> Edit:
        matrices = [name for name in target.names if _is_matrix(draft, name)]
        attention = [name for name in matrices if split(name)[1].startswith(("attn_q.", "attn_k.", "attn_v."))]
        others = [name for name in matrices if name not in set(attention)]
        hit = [*_drawn(draft, target, attention, OF_ATTENTION), *_drawn(draft, target, others, DRIFTED - OF_ATTENTION)]
        return merged(draft, [Step("noise", hit, target.strength)], faults) if attention else _nothing(target)

    return plan


def _drawn(draft: Draft, target: Target, names: Sequence[str], n: int) -> list[str]:
    """`n` of the names, in their order; all where there are fewer."""
    order = draft.rng(target.fault, *names).permutation(len(names))[:n]
    return [names[i] for i in sorted(order)]


def _is_matrix(draft: Draft, name: str) -> bool:
    return len(draft.contents[name].info.shape) > 1


def _nothing(target: Target) -> Edit:
    raise BadInputError(
        f"{target.fault} changes nothing: none of the tensors is one that it touches",
        hint="choose other tensors with --tensors and --layers",
    )
