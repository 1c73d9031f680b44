from __future__ import annotations

import numpy as np
import pytest

from diffharness.forensics.drift import TensorError
from diffharness.forensics.heads import Heads
from diffharness.forensics.patterns import find_patterns
from diffharness.records.inspect import PatternRow

N_LAYER = 12
KINDS = ["global" if il % 6 == 5 else "sliding" for il in range(N_LAYER)]
PLAIN = ["full"] * N_LAYER
CLASSES = ("attn_norm", "attn_q", "attn_k", "ffn_up", "ffn_down_exps", "layer_output_scale")
HEADS = Heads((8,) * N_LAYER, (2,) * N_LAYER)
SHAPES = {"attn_q": (64, 32), "attn_k": (16, 32), "ffn_up": (96, 32), "ffn_down_exps": (4, 32, 16)}


class FarError(TensorError):
    """A TensorError that knows its far rows."""

    far: np.ndarray | None = None


def tensor(name: str, far: np.ndarray | None = None) -> TensorError:
    klass = name.split(".")[-2]
    shape = SHAPES.get(klass, (32,))
    t = FarError(name, "Q4_K", shape, 0.5, 0.005, 0.7, 0, 0 if far is None else int(far.sum()), 0, 0.02)
    object.__setattr__(t, "far", far)
    return t


def named(il: int, klass: str) -> str:
    return f"blk.{il}.{klass}.weight"


EVERY = [
    tensor("token_embd.weight"),
    *(tensor(named(il, klass)) for il in range(N_LAYER) for klass in CLASSES),
    tensor("output_norm.weight"),
]


def patterns(names: set[str], kinds: list[str] = PLAIN, **more) -> list[PatternRow]:
    assert names <= {t.name for t in EVERY}
    return find_patterns([t for t in EVERY if t.name in names], EVERY, kinds, **more)


def only(rows: list[PatternRow]) -> PatternRow:
    assert len(rows) == 1, [row.message for row in rows]
    return rows[0]


def test_nothing_damaged_is_no_pattern() -> None:
    assert patterns(set()) == []


@pytest.mark.parametrize("residues", [{0, 1}, {2, 3, 4, 5}, {3}])
def test_period(residues: set[int]) -> None:
    layers = [il for il in range(N_LAYER) if il % 6 in residues] if len(residues) > 1 else [0, 4, 8]
    period, residues = (6, residues) if len(residues) > 1 else (4, {0})
    names = {named(il, klass) for il in layers for klass in ("attn_q", "attn_k", "ffn_up")}
    row = only(patterns(names))
    assert row.kind == "periodic" and set(row.tensors) == names
    assert (row.evidence["period"], row.evidence["residues"]) == (period, sorted(residues))
    assert (row.evidence["share"], row.evidence["sound"], row.evidence["layers"]) == (1.0, 0, layers)
    assert "attn_q, attn_k, ffn_up in every layer whose number mod" in row.message


def test_a_period_with_a_gap_is_still_one() -> None:
    """One of sixteen tensors escaped: said in the evidence, and the pattern stands."""
    names = {named(il, k) for il in range(N_LAYER) if il % 6 > 1 for k in ("attn_q", "ffn_up")} - {named(8, "ffn_up")}
    row = only(patterns(names))
    assert (row.kind, row.evidence["residues"], row.evidence["sound"]) == ("periodic", [2, 3, 4, 5], 1)
    assert "but for 1 of 16" in row.message


def test_issue_6056_is_a_period_and_a_class() -> None:
    names = {named(il, k) for il in range(N_LAYER) if il % 6 > 1 for k in ("attn_q", "attn_k", "ffn_up")}
    scales = {named(il, "layer_output_scale") for il in range(N_LAYER)}
    first, second = patterns(names | scales, KINDS)
    assert (first.kind, first.evidence["period"], set(first.tensors)) == ("periodic", 6, names)
    assert (second.kind, set(second.tensors)) == ("class", scales)
    assert second.message == "layer_output_scale in every layer"


def test_a_kind_of_layers_rather_than_a_period() -> None:
    row = only(patterns({named(il, "attn_q") for il in (5, 11)}, KINDS))
    assert (row.kind, row.evidence["layer_kind"]) == ("layer_kind", "global")
    assert row.message == "attn_q in every global layer (5, 11)"


def test_range_layer_class_everything() -> None:
    row = only(patterns({named(il, k) for il in range(3, 8) for k in ("attn_q", "ffn_up")}))
    assert (row.kind, row.evidence["first_layer"], row.evidence["last_layer"]) == ("layer_range", 3, 7)
    row = only(patterns({named(4, k) for k in CLASSES}, KINDS))
    assert (row.kind, row.message) == ("layer", "every tensor in layer 4 (sliding)")
    row = only(patterns({named(il, "attn_norm") for il in range(N_LAYER)}))
    assert (row.kind, row.message) == ("class", "attn_norm in every layer")
    row = only(patterns({named(il, k) for il in range(N_LAYER) for k in ("attn_q", "attn_k")}))
    assert (row.kind, row.message) == ("classes", "attn_q, attn_k in every layer")
    row = only(patterns({t.name for t in EVERY}))
    assert row.kind == "everywhere" and len(row.tensors) == len(EVERY)


def test_single_tensors_are_listed() -> None:
    row = only(patterns({"token_embd.weight"}))
    assert (row.kind, row.message) == ("tensor", "token_embd.weight")
    row = only(patterns({named(0, "attn_q"), named(7, "ffn_up"), "token_embd.weight"}))
    assert row.kind == "tensors" and len(row.tensors) == 3


def test_a_class_and_a_stray_tensor_are_two_rows() -> None:
    names = {named(il, "ffn_up") for il in range(N_LAYER)} | {"token_embd.weight"}
    first, second = patterns(names)
    assert (first.kind, second.kind, second.tensors) == ("class", "tensor", ["token_embd.weight"])
    assert (first.message, second.message) == ("ffn_up in every layer", "token_embd.weight")


def test_scattered_layers_are_no_pattern() -> None:
    assert only(patterns({named(il, "attn_q") for il in (1, 5, 7)})).kind == "tensors"


def test_a_class_that_only_some_layers_have() -> None:
    every = [t for t in EVERY if t.klass != "attn_k.weight" or t.layer in (2, 3, 9)]
    damaged = [t for t in every if t.klass == "attn_k.weight"]
    row = only(find_patterns(damaged, every, PLAIN))
    assert (row.kind, row.message) == ("class", "attn_k in every layer that has it (2, 3, 9)")


def test_shard() -> None:
    def shard_of(name: str) -> int:
        il = int(name.split(".")[1]) if name.startswith("blk.") else 0
        return 0 if il < 4 or (il == 4 and "attn" in name) else 1 if il < 9 else 2

    names = {t.name for t in EVERY if shard_of(t.name) == 1}
    row = only(patterns(names, shard_of=shard_of))
    assert (row.kind, row.evidence["shard"], row.evidence["shards"], row.evidence["share"]) == ("shard", 1, 3, 1.0)
    assert set(row.tensors) == names and "shard 2 of 3" in row.message
    assert only(patterns({named(6, "attn_q")}, shard_of=shard_of)).kind == "tensor"
    assert only(patterns({named(il, "attn_q") for il in range(N_LAYER)}, shard_of=shard_of)).kind == "class"


def with_far(klass: str, layers: list[int], rows: slice | list[int]) -> tuple[list[TensorError], list[TensorError]]:
    n = int(np.prod(SHAPES[klass][:-1]))
    far = np.zeros(n, dtype=bool)
    far[rows] = True
    damaged = [tensor(named(il, klass), far) for il in layers]
    return damaged, [*damaged, *(t for t in EVERY if t.name not in {d.name for d in damaged})]


@pytest.mark.parametrize(
    ("klass", "rows", "kind", "numbers"),
    [
        ("ffn_down_exps", slice(64, 96), "expert", [2]),
        ("attn_q", slice(40, 48), "head", [5]),
        ("attn_k", slice(8, 16), "head", [1]),
        ("attn_q", [3], "row", [3]),
        ("ffn_up", [17, 80], "row", [17, 80]),
    ],
)
def test_within_tensors(klass: str, rows, kind: str, numbers: list[int]) -> None:
    damaged, every = with_far(klass, [1, 2, 3], rows)
    where, part = find_patterns(damaged, every, PLAIN, hyper=HEADS)
    assert (where.kind, part.kind) == ("layer_range", kind)
    assert part.evidence[f"{kind}s"] == numbers and len(part.tensors) == 3
    assert part.message.startswith(f"only {kind}") and part.message.endswith(f"of {klass} in layers 1-3")


def test_most_rows_are_no_part() -> None:
    damaged, every = with_far("attn_q", [1], slice(0, 40))
    assert only(find_patterns(damaged, every, PLAIN, hyper=HEADS)).kind == "tensor"


def test_heads_from_metadata() -> None:
    said = {"general.architecture": "x", "x.block_count": 2, "x.attention.head_count": 8}
    assert Heads.of(said) == Heads((8, 8), (8, 8))
    by_layer = said | {"x.attention.head_count_kv": [2, 4]}
    assert Heads.of(by_layer).of_tensor(1, "attn_v.weight") == 4
    assert Heads.of(by_layer).of_tensor(1, "attn_output.weight") == 8
    assert Heads.of({"general.architecture": "x", "x.block_count": "no"}).of_tensor(0, "attn_q.weight") == 0
