"""Which part of a model a tensor belongs to, and what measured tensors add up to: by class, by layer, by both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from diffharness.records.inspect import Grid, GroupRow, TensorMeasures, Totals
from diffharness.taps import split

# Class by the name without its layer; the first pattern that fits counts.
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("router", "ffn_gate_inp*"),
    ("router", "exp_probs_b*"),
    ("scalars", "*.scale"),
    ("scalars", "layer_output_scale.*"),
    ("scalars", "attn_sinks.*"),
    ("norms", "*norm*"),
    ("experts", "*_exps.*"),
    ("experts", "*_shexp.*"),
    ("attn_q", "attn_q.*"),
    ("attn_k", "attn_k.*"),
    ("attn_v", "attn_v.*"),
    ("attn_qkv", "attn_qkv.*"),
    ("attn_q", "attn_q_[ab].*"),  # latent attention: to the compressed query and from it
    ("attn_kv", "attn_kv_a_mqa.*"),
    ("attn_kv", "attn_kv_b.*"),
    ("attn_k", "attn_k_b.*"),
    ("attn_v", "attn_v_b.*"),
    ("attn_gate", "attn_gate.*"),
    ("attn_output", "attn_output.*"),
    ("ssm_in", "ssm_in.*"),
    ("ssm_in", "shortconv.in_proj.*"),
    ("ssm_out", "ssm_out.*"),
    ("ssm_out", "shortconv.out_proj.*"),
    ("ssm", "ssm_*"),
    ("ssm", "shortconv.*"),
    ("ffn_gate", "ffn_gate.*"),
    ("ffn_up", "ffn_up.*"),
    ("ffn_down", "ffn_down.*"),
    ("embedding", "*token_embd.*"),
    ("embedding", "position_embd.*"),
    ("output", "output.*"),
)
OTHER = "other"
# In the order of a layer's computation.
CLASSES = (
    "embedding", "attn_q", "attn_k", "attn_v", "attn_kv", "attn_qkv", "attn_gate", "attn_output", "ssm_in", "ssm",
    "ssm_out", "ffn_gate", "ffn_up", "ffn_down", "router", "experts", "norms", "scalars", OTHER, "output",
)  # fmt: skip
ATTENTION = frozenset(klass for klass in CLASSES if klass.startswith("attn_"))


def class_of(name: str) -> str:
    """`attn_q` for `blk.3.attn_q.weight`; one of `CLASSES`."""
    _, rest = split(name)
    return next((klass for klass, pattern in _PATTERNS if fnmatchcase(rest, pattern)), OTHER)


def totals(tensors: Sequence[TensorMeasures]) -> Totals:
    """How many tensors there are, were compared, and drifted, and how many of those are attention's."""
    drifted = [t for t in tensors if t.drifted]
    return Totals(
        tensors=len(tensors),
        compared=sum(t.artifact is not None for t in tensors),
        drifted=len(drifted),
        drifted_attention=sum(t.klass in ATTENTION for t in drifted),
        bits_per_weight=_bpw(tensors) if tensors else None,
    )


def by_class(tensors: Sequence[TensorMeasures]) -> list[GroupRow]:
    """One row per class that there is, in the order of `CLASSES`."""
    return _groups(tensors, lambda t: t.klass, CLASSES)


def by_layer(tensors: Sequence[TensorMeasures]) -> list[GroupRow]:
    """One row per layer, named by its number; tensors outside of the layers are left out."""
    layers = sorted({t.layer for t in tensors if t.layer is not None})
    return _groups(tensors, lambda t: t.layer, layers)


def grid(tensors: Sequence[TensorMeasures]) -> Grid:
    """Layer x class: the worst ratio of the tensors there, and whether any of them drifted."""
    inside = [t for t in tensors if t.layer is not None]
    layers = sorted({t.layer for t in inside if t.layer is not None})
    found = {t.klass for t in inside}
    classes = [klass for klass in CLASSES if klass in found]
    cells = [[[t for t in inside if (t.layer, t.klass) == (il, k)] for k in classes] for il in layers]
    return Grid(
        layers=layers,
        classes=classes,
        ratios=[[max(_known(t.ratio for t in cell), default=None) for cell in row] for row in cells],
        drifted=[[any(t.drifted for t in cell) for cell in row] for row in cells],
    )


def size(t: TensorMeasures) -> int:
    """Number of values."""
    return math.prod(t.shape)


def _groups(
    tensors: Sequence[TensorMeasures], key: Callable[[TensorMeasures], object], order: Iterable[object]
) -> list[GroupRow]:
    rows = []
    for group in order:
        members = [t for t in tensors if key(t) == group]
        if members:
            rows.append(_group(str(group), members))
    return rows


def _group(name: str, members: Sequence[TensorMeasures]) -> GroupRow:
    controls = [(size(t), t.control.error) for t in members if t.control is not None]
    judged = [t for t in members if t.ratio is not None]
    worst = max(judged, key=lambda t: _rank(t.ratio), default=None)
    return GroupRow(
        group=name,
        n=len(members),
        drifted=sum(t.drifted for t in members),
        n_params=sum(map(size, members)),
        bpw=_bpw(members),
        error=_rms([(size(t), t.artifact.error) for t in members if t.artifact is not None]),
        control=_rms(controls) if controls else None,
        cos_min=min((t.artifact.cos for t in members if t.artifact is not None), default=None),
        worst=worst.name if worst is not None else None,
    )


def _rms(weighed: Sequence[tuple[int, float]]) -> float:
    total = sum(n for n, _ in weighed)
    return math.sqrt(sum(n * value * value for n, value in weighed) / total) if total else 0.0


def _bpw(tensors: Sequence[TensorMeasures]) -> float:
    total = sum(map(size, tensors))
    return sum(size(t) * t.bpw for t in tensors) / total if total else 0.0


def _rank(ratio: float | None) -> float:
    return -1.0 if ratio is None else math.inf if math.isnan(ratio) else ratio


def _known(ratios: Iterable[float | None]) -> list[float]:
    return [_rank(ratio) for ratio in ratios if ratio is not None]
