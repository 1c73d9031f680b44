"""Relations that move values about: rotary orders, transposition, and permuted heads, experts, rows or columns.

Rows are matched by random projections of their directions, the best candidate then compared in full; rows that are
where they belong are not matched. Rotary orders are those of `weights.names`: interleaved pairs (ggml's NORM rope)
or half-split (Hugging Face's), by heads of the tensor's own number or, as in llama.cpp #3364, of the other's.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from diffharness.forensics._pair import Pair, Relation, nmse
from diffharness.forensics.heads import Heads
from diffharness.layers import ranges
from diffharness.weights.names import RotaryPairs
from diffharness.weights.source import Float32Array, IntArray

_SKETCH = 64  # projections
_SAMPLED = 64  # rows tried before all are
_MOST_PAIRS = 1 << 32  # rows times candidates that are matched; beyond, the sample speaks for all
_CHUNK = 1 << 25  # scores in memory
_NARROW = 8  # values below which a row has no direction to be known by
_NEARER = 0.5  # NMSE of a match, over that of the row in its own place
_MANY = 64

# -- rotary orders --------------------------------------------------------------------------------------


def rotary(pair: Pair, heads: Heads) -> Relation | None:
    """Q or K rows of each head in the other order, or permuted by the wrong number of heads."""
    part = pair.t.klass.split(".")[0]
    n_head, n_head_kv = heads.counts(pair.t.layer)
    own, other = (n_head, n_head_kv) if part == "attn_q" else (n_head_kv, n_head)
    n_rows = pair.a.shape[0]
    if part not in ("attn_q", "attn_k") or not own or n_rows % (2 * own):
        return None
    for order, n, rows in _orders(n_rows, own, other):
        if (rows == np.arange(n_rows)).all():
            continue
        residual = pair.left(pair.b[rows])
        if not pair.explains(residual):
            continue
        if order == "wrong_heads":
            words = f"rows permuted for rotary pairs as if of {n} heads, which is not its own number"
        else:
            of = "" if n == own else f" as if of {n} heads"
            words = f"{_ORDERS[order]}{of}"
        evidence = {"order": order, "heads": own, "heads_used": n}
        return Relation("rotary_order", words, residual, evidence, (order, None if n == own else n))
    return None


_ORDERS = {
    "half_split": "rows of each head in half-split order (Hugging Face's): the rotary permutation is missing or undone",
    "interleaved": "rows of each head in interleaved pairs (for ggml's NORM rope): one rotary permutation too many",
}


def _orders(n_rows: int, own: int, other: int) -> Iterator[tuple[str, int, IntArray]]:
    """(order, heads, for each of the artifact's rows the checkpoint's row that it would be)."""
    index = np.arange(n_rows)
    counts = [own] if other in (0, own) or n_rows % (2 * other) else [own, other]
    for n in counts:
        yield "half_split", n, _half_split(index, n)
        yield "interleaved", n, _interleaved(index, n)
    for n in counts[1:]:
        yield "wrong_heads", n, _interleaved(_half_split(index, own), n)


def _half_split(rows: IntArray, n_head: int) -> IntArray:
    [out] = RotaryPairs(n_head).to_hf(rows)  # type: ignore[arg-type]  # it moves rows of anything
    return np.asarray(out, dtype=np.int64)


def _interleaved(rows: IntArray, n_head: int) -> IntArray:
    return np.asarray(RotaryPairs(n_head).to_gguf([rows]), dtype=np.int64)  # type: ignore[list-item]


# -- transposed -----------------------------------------------------------------------------------------


def transposed(pair: Pair) -> Relation | None:
    """A matrix (or each of a stack) with rows and columns exchanged, or stored in column order under its own shape."""
    shape = pair.a.shape
    if len(shape) < 2 or 1 in shape[-2:]:
        return None
    if shape[-2] == shape[-1]:
        residual = pair.left(np.ascontiguousarray(pair.b.swapaxes(-1, -2)))
        return Relation("transposed", "transposed", residual) if pair.explains(residual) else None
    turned = np.ascontiguousarray(pair.b.swapaxes(-1, -2)).reshape(shape)
    residual = pair.left(turned)
    if pair.explains(residual):
        return Relation("transposed", "stored transposed under the shape it should have", residual)
    back = np.ascontiguousarray(pair.b.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2))
    residual = pair.left(back)
    if pair.explains(residual):
        return Relation("transposed", "read as if it had been transposed, under the shape it should have", residual)
    return None


def turned_shape(pair_a: Float32Array, b: Float32Array) -> tuple[str, float] | None:
    """(words, NMSE) for an artifact's tensor whose shape is the checkpoint's turned round."""
    if pair_a.shape != (*b.shape[:-2], b.shape[-1], b.shape[-2]):
        return None
    tries = (
        ("transposed, its shape too", np.ascontiguousarray(b.swapaxes(-1, -2))),
        ("the checkpoint's values in order under a transposed shape", b.reshape(pair_a.shape)),
    )
    return min(((words, nmse(pair_a, c)) for words, c in tries), key=lambda found: found[1])


# -- permuted -------------------------------------------------------------------------------------------


def permuted_experts(pair: Pair) -> Relation | None:
    """Experts of a stack in another order."""
    if pair.a.ndim != 3 or pair.a.shape[0] < 2:
        return None
    flat_a, flat_b = (x.reshape(len(x), -1) for x in (pair.a, pair.b))
    stride = max(1, flat_a.shape[1] // 4096) | 1
    found = match_rows(flat_a[:, ::stride], flat_b[:, ::stride])
    if found is None or isinstance(found, Sampled):
        return None
    residual = pair.left(pair.b[found])
    return _permuted("experts", "expert", found, residual) if pair.explains(residual) else None


def permuted_rows(pair: Pair, heads: Heads) -> Relation | None:
    """Rows (over all experts of a stack) in another order; said as heads or experts where whole ones moved."""
    if pair.a.ndim < 2:
        return None
    a, b = (x.reshape(-1, x.shape[-1]) for x in (pair.a, pair.b))
    n_head = heads.of_tensor(pair.t.layer, pair.t.klass) if not pair.t.klass.startswith("attn_output") else 0
    one_row = "expert" if pair.t.klass.startswith("ffn_gate_inp.") else "row"
    return _moved(pair, a, b, n_head, one_row)


def permuted_columns(pair: Pair, heads: Heads) -> Relation | None:
    """Columns of a matrix in another order; whole heads in attn_output."""
    if pair.a.ndim != 2:
        return None
    n_head = heads.of_tensor(pair.t.layer, pair.t.klass) if pair.t.klass.startswith("attn_output") else 0
    a, b = (np.ascontiguousarray(x.T) for x in (pair.a, pair.b))
    return _moved(pair, a, b, n_head, "column")


def _moved(pair: Pair, a: Float32Array, b: Float32Array, n_head: int, what: str) -> Relation | None:
    found = match_rows(a, b)
    if found is None:
        return None
    if isinstance(found, Sampled):
        words = f"{what}s in another order, told by {found.rows} of them"
        return Relation(f"permuted_{what}s", words, found.residual, {"sampled": found.rows}, "sampled")
    if what == "column":
        residual = pair.left(np.ascontiguousarray(b[found].T))
    else:
        residual = pair.left(b[found].reshape(pair.a.shape))
    if not pair.explains(residual):
        return None
    if n_head > 1 and len(found) % n_head == 0:
        size = len(found) // n_head
        by_head = found.reshape(n_head, size)
        if (by_head == by_head[:, :1] // size * size + np.arange(size)).all():
            return _permuted("heads", "head", by_head[:, 0] // size, residual)
    return _permuted(f"{what}s", what, found, residual)


def _permuted(kind: str, one: str, found: IntArray, residual: float) -> Relation:
    """The relation for `found`: where each place's content comes from."""
    n = len(found)
    moved = np.flatnonzero(found != np.arange(n))
    steps, counts = np.unique((found - np.arange(n)) % n, return_counts=True)
    shift = int(steps[counts.argmax()])
    evidence = {"n": n, "moved": len(moved), "places": moved[:_MANY].tolist(), "from": found[moved[:_MANY]].tolist()}
    repeated = len(np.unique(found)) < n
    key: object = tuple(evidence["places"]), tuple(evidence["from"])
    if shift and counts.max() > 0.9 * n:
        evidence["shift"] = shift if shift <= n // 2 else shift - n
        words = f"{one}s displaced by {-evidence['shift']:+d}"
    elif (found == np.arange(n)[::-1]).all():
        evidence["reversed"] = True
        words = f"{one}s in reverse order"
    elif len(moved) == 2 and not repeated:
        words = f"{one}s {moved[0]} and {moved[1]} exchanged"
    elif repeated:
        words = f"{len(moved)} of {n} {one}s hold those of others, some of them twice"
    elif n <= 16:
        words = f"{one}s in the order {', '.join(map(str, found.tolist()))}"
    else:
        words = f"{len(moved)} of {n} {one}s in another order"
        if len(moved) <= 8:
            words += f" ({ranges(moved.tolist())})"
    return Relation(f"permuted_{kind}", words, residual, evidence, key, f"{one}s in another order, each in its own")


# -- matching -------------------------------------------------------------------------------------------


class Sampled:
    """Too many rows to match all: `rows` of them were, leaving `residual` (NMSE)."""

    def __init__(self, rows: int, residual: float) -> None:
        self.rows, self.residual = rows, residual


def match_rows(a: Float32Array, b: Float32Array) -> NDArray[np.int64] | Sampled | None:
    """For each row of `a` [n, width] the row of `b` that it is nearest to; None where they do not look permuted.

    A row stays where it is unless another row of `b` is clearly nearer.
    """
    n, width = a.shape
    if n < 2 or width < _NARROW or not np.isfinite(a).all():
        return None
    own = _distances(a, b)
    away = np.flatnonzero(own > max(1e-6, min(0.25, 8 * float(np.median(own)))))
    if not len(away):
        return None
    projection = _projection(width)
    targets = _directions(b, projection)
    sample = away[:: max(1, len(away) // _SAMPLED)][:_SAMPLED]
    nearest = _nearest(_directions(a[sample], projection), targets)
    distance = _distances(a[sample], b[nearest])
    good = (nearest != sample) & (distance < _NEARER * own[sample])
    if 2 * good.sum() < len(sample):
        return None
    if len(away) * n > _MOST_PAIRS:
        return Sampled(len(sample), float(np.mean(distance)))
    found = np.arange(n)
    nearest = _nearest(_directions(a[away], projection), targets)
    better = _distances(a[away], b[nearest]) < own[away]
    found[away[better]] = nearest[better]
    return found


def _projection(width: int) -> Float32Array | None:
    if width <= 2 * _SKETCH:
        return None
    return np.random.default_rng(0).standard_normal((width, _SKETCH), dtype=np.float32)


def _directions(rows: Float32Array, projection: Float32Array | None) -> Float32Array:
    """Unit vectors [n, sketch]; rows of zeros stay zeros."""
    out = rows if projection is None else rows @ projection
    norm = np.sqrt(np.einsum("ij,ij->i", out, out))
    return np.asarray(out / np.where(norm > 0, norm, 1)[:, None], dtype=np.float32)


def _nearest(rows: Float32Array, targets: Float32Array) -> NDArray[np.int64]:
    step = max(1, _CHUNK // len(targets))
    parts = [(rows[i : i + step] @ targets.T).argmax(axis=1) for i in range(0, len(rows), step)]
    return np.concatenate(parts).astype(np.int64)


def _distances(a: Float32Array, b: Float32Array) -> NDArray[np.float64]:
    """NMSE of each row of `a` against the same row of `b`; 0 for two rows of zeros."""
    n, width = a.shape
    out = np.empty(n)
    step = max(1, (1 << 21) // width)
    for i in range(0, n, step):
        y = b[i : i + step].astype(np.float64)
        power = np.einsum("ij,ij->i", y, y)
        y -= a[i : i + step]
        error = np.einsum("ij,ij->i", y, y)
        with np.errstate(divide="ignore", invalid="ignore"):
            out[i : i + step] = np.where(error == 0, 0.0, error / power)
    return out
