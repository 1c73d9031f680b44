"""What the values of damaged tensors are, in terms of the checkpoint's: permuted, scaled, exchanged, zeroed, or noise.

Each damaged tensor is read once more, beside its counterpart, and relations are tried on it from the simplest to
the least. A relation is named only if it explains: what it leaves must be near what the type loses by itself
(`_pair` has the numbers). What no relation explains is called noise at its SQNR, or values unrelated to the
checkpoint's. Two tensors of one shape are in memory at a time, and what a relation predicts of them.

Large matrices are looked at through some of their rows first: where these hold the checkpoint's rows and noise on
them, nothing else is tried. Nor is it where three of a class were searched in vain.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from diffharness.forensics._blocks import Bytes, displaced, some_blocks
from diffharness.forensics._elementwise import (
    affine,
    clipped,
    constant,
    float16_range,
    non_finite,
    offset,
    scale,
    scaled_columns,
    scaled_rows,
    small_zeroed,
)
from diffharness.forensics._pair import Pair, Relation, Search, nmse
from diffharness.forensics._permutations import (
    permuted_columns,
    permuted_experts,
    permuted_rows,
    rotary,
    transposed,
    turned_shape,
)
from diffharness.forensics._scalars import scalars
from diffharness.forensics._sketches import Origin, Sketches, tell_sources
from diffharness.forensics._telling import merged
from diffharness.forensics._unexplained import UNEXPLAINED, unexplained
from diffharness.forensics.drift import TensorError
from diffharness.forensics.heads import Heads
from diffharness.records.inspect import PatternRow
from diffharness.taps import split
from diffharness.weights.dequant import BLOCKS
from diffharness.weights.source import EMBEDDING, HEAD, Float32Array, WeightSource

_LARGE = 1 << 20  # elements from which on a sample is looked at first
_SAMPLE_ROWS = 64
_CLEARLY = 0.5  # cosine of rows with noise on them to the checkpoint's
_IN_VAIN = 3  # large tensors of a class that are looked at in full without an explanation
_NEAR = 1.25  # times the control's error: what is left is what the type loses, and no other relation is tried
_EXACT = 1e-12  # NMSE of float32 rounding
_BETTER = 0.8  # of what a simpler relation leaves, from which on the less simple is meant


def find_relations(
    damaged: Sequence[TensorError],
    artifact: WeightSource,
    checkpoint: WeightSource,
    tensors: Sequence[TensorError],
    kinds: Sequence[str] = (),
) -> list[PatternRow]:
    """What the damaged tensors hold, one row for all tensors with the same explanation, that of most tensors first.

    `tensors` are all compared ones, `kinds` the layers' by number, both for the words. Tensors with NaN or
    infinity may be among the damaged.
    """
    heads = Heads.of(checkpoint.metadata)
    origins, rest = _origins(damaged, artifact, checkpoint)
    rows = tell_sources(origins, [t.name for t in tensors])
    found: list[tuple[TensorError, Relation]] = []
    single: list[tuple[TensorError, float, float]] = []
    vain: Counter[str] = Counter()  # large tensors of a class that were looked at in full and not explained
    for t in rest:
        a_name, b_name = _stored(t.name, artifact), _stored(t.name, checkpoint)
        a_info, b_info = artifact.tensors[a_name], checkpoint.tensors[b_name]
        if a_info.shape != b_info.shape:
            found.append((t, _misshapen(t, artifact.read(a_name), checkpoint.read(b_name))))
        elif a_info.n_elements == 1:
            single.append((t, float(artifact.read(a_name).item()), float(checkpoint.read(b_name).item())))
        else:
            relation = _by_sample(t, a_name, b_name, artifact, checkpoint, given_up=vain[t.klass] >= _IN_VAIN)
            if relation is None:
                relation = _relation(t, a_name, b_name, artifact, checkpoint, heads)
                vain[t.klass] += relation.kind in UNEXPLAINED
            found.append((t, relation))
    rows += merged([*found, *scalars(single)], tensors, kinds)
    return sorted(rows, key=lambda row: (row.kind in UNEXPLAINED, -len(row.tensors)))


def _stored(name: str, source: WeightSource) -> str:
    """The name under which a source has the tensor: a tied head is the embedding."""
    return name if name in source.tensors or name != HEAD else EMBEDDING


# -- other tensors --------------------------------------------------------------------------------------


def _origins(
    damaged: Sequence[TensorError], artifact: WeightSource, checkpoint: WeightSource
) -> tuple[list[Origin], list[TensorError]]:
    """Tensors that hold another of the checkpoint's tensors, and the others."""
    sketches = Sketches(checkpoint)
    origins: list[Origin] = []
    rest: list[TensorError] = []
    for t in damaged:
        a_name = _stored(t.name, artifact)
        local = t.error <= t.limit
        source = None if local or a_name != t.name else sketches.candidate(artifact, a_name)
        origin = None if source is None else _origin(t, artifact.read(a_name), source, checkpoint)
        if origin is None:
            rest.append(t)
        else:
            origins.append(origin)
    if origins:
        follow = [o for o in (_follows(t, origins, artifact, checkpoint) for t in rest) if o is not None]
        names = {origin.name for origin in follow}
        origins += follow
        rest = [t for t in rest if t.name not in names]
    return origins, rest


def _origin(t: TensorError, a: Float32Array, source: str, checkpoint: WeightSource) -> Origin | None:
    pair = Pair(t, a, checkpoint.read(source))
    residual = pair.left(pair.b)
    # Norms are all near one value, and so near each other: of vectors only the very values count.
    found = pair.explains(residual) if a.ndim > 1 else pair.whole(residual)
    return Origin(t.name, source, residual) if found else None


def _follows(
    t: TensorError, origins: Sequence[Origin], artifact: WeightSource, checkpoint: WeightSource
) -> Origin | None:
    """A tensor too small to be known by itself that moved with the others of its layer."""
    votes: dict[int, int] = defaultdict(int)
    for origin in origins:
        (layer, klass), (there, other) = split(origin.name), split(origin.source)
        if klass == other and layer == t.layer and there is not None:
            votes[there] += 1
    if not votes or math.prod(t.shape) > _SAMPLE_ROWS:
        return None
    source = f"blk.{max(votes, key=lambda il: votes[il])}.{t.klass}"
    if source not in checkpoint.tensors or checkpoint.tensors[source].shape != t.shape:
        return None
    return _origin(t, artifact.read(t.name), source, checkpoint)


# -- one tensor -----------------------------------------------------------------------------------------


def _relation(
    t: TensorError, a_name: str, b_name: str, artifact: WeightSource, checkpoint: WeightSource, heads: Heads
) -> Relation:
    pair = Pair(t, artifact.read(a_name), checkpoint.read(b_name))
    raw: Callable[[str], Bytes] | None = getattr(artifact, "raw", None)
    best: Relation | None = None
    for search in _searches(heads, BLOCKS[t.type][0] == t.shape[-1], partial(raw, a_name) if raw is not None else None):
        found = search(pair)
        if found is None:
            continue
        if best is None or found.residual < _BETTER * best.residual:
            best = found
        if best.residual <= _NEAR * pair.control + _EXACT:
            return best
    return best or _isolated_rows(pair) or unexplained(pair)


def _searches(heads: Heads, row_is_block: bool, raw: Callable[[], Bytes] | None) -> Iterator[Search]:
    """From the simplest: of two that explain a tensor, the first is meant."""
    yield from (constant, float16_range, offset, scale, affine, clipped, small_zeroed, non_finite)
    yield partial(rotary, heads=heads)
    yield from (transposed, permuted_experts)
    yield partial(permuted_rows, heads=heads)
    # Where a row is one block of the type, its scale is the block's.
    yield from (some_blocks, scaled_rows) if row_is_block else (scaled_rows, some_blocks)
    yield scaled_columns
    yield partial(permuted_columns, heads=heads)
    if raw is not None:
        yield partial(displaced, raw=raw)


def _isolated_rows(pair: Pair) -> Relation | None:
    """Some rows beyond the control, in a tensor that is within its limit."""
    t, n = pair.t, pair.a.size // pair.a.shape[-1]
    if t.non_finite or not t.error <= t.limit or not 0 < t.far_rows <= n // 4:
        return None
    rows = [] if t.far is None else np.flatnonzero(t.far)[:_SAMPLE_ROWS].tolist()
    words = f"{t.far_rows} of {n} rows hold something else; the rest is sound"
    evidence = {"rows": rows, "n": t.far_rows}
    several = "isolated rows hold something else; the rest is sound"
    return Relation("isolated_rows", words, t.error, evidence, several=several)


def _misshapen(t: TensorError, a: Float32Array, b: Float32Array) -> Relation:
    turned = turned_shape(a, b)
    if turned is not None and turned[1] <= max(0.1, t.limit if math.isfinite(t.limit) else 0.0):
        return Relation("transposed", turned[0], turned[1], key=turned[0])
    words = f"another shape: {list(a.shape)}, the checkpoint's is {list(b.shape)}"
    evidence = {"shape": list(a.shape), "checkpoint": list(b.shape)}
    return Relation("shape", words, math.inf, evidence, (a.shape, b.shape))


def _by_sample(
    t: TensorError, a_name: str, b_name: str, artifact: WeightSource, checkpoint: WeightSource, *, given_up: bool
) -> Relation | None:
    """Noise in a large matrix, if some rows show the checkpoint's, damaged like the whole and by nothing simpler.

    `given_up`: tensors of its class were looked at in full in vain, so that any sample like the whole will do.
    """
    if math.prod(t.shape) <= _LARGE or len(t.shape) != 2 or t.non_finite:
        return None
    rows = np.unique(np.linspace(0, t.shape[0] - 1, _SAMPLE_ROWS).astype(np.int64))
    a, b = artifact.take(a_name, rows), checkpoint.take(b_name, rows)
    error = nmse(a, b)
    if not 0.5 * t.error < error < 2 * t.error or t.error <= t.limit:
        return None
    pair = Pair(replace(t, error=error, shape=a.shape), a, b)
    if any(search(pair) for search in (offset, scale, affine, clipped, scaled_rows, scaled_columns, some_blocks)):
        return None
    found = unexplained(pair)
    found.evidence["rows_sampled"] = len(rows)
    return found if given_up or (found.kind == "noise" and found.evidence["cos"] > _CLEARLY) else None
