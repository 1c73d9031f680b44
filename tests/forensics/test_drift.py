from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np
import pytest

from diffharness.errors import CheckpointError
from diffharness.forensics.drift import tensor_errors
from diffharness.weights.source import TensorInfo

FLOORS = {
    "artifact.weighed_factor": 15.0,
    "artifact.weighed_most": 0.25,
    "artifact.levels": 0.1,
    "artifact.levels_row": 0.3,
    "artifact.levels_usual": 0.002,
    "artifact.scale": 1.2,
    "artifact.shift": 0.3,
    "artifact.tensor_factor": 4.0,
    "artifact.tensor_floor": 1e-9,
    "artifact.row_factor": 20.0,
    "artifact.row_floor": 0.1,
    "artifact.block_floor": 0.75,
    "artifact.block_factor": 40.0,
}


class Source:
    """A WeightSource in memory; `types` quantizes on the way in."""

    label, arch = "memory", "test"

    def __init__(self, values: Mapping[str, np.ndarray], types: Mapping[str, str] | None = None) -> None:
        self.metadata: dict[str, object] = {}
        self.types = dict(types or {})
        self.values = {name: through(v, self.types.get(name, "F32")) for name, v in values.items()}

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {n: TensorInfo(n, v.shape, self.types.get(n, "F32"), v.nbytes) for n, v in self.values.items()}

    def read(self, name: str) -> np.ndarray:
        return self.values[name].copy()

    def take(self, name: str, rows) -> np.ndarray:
        return self.values[name][rows]


def through(values: np.ndarray, type_name: str) -> np.ndarray:
    """`values` quantized by gguf-py, and back."""
    kind = gguf.GGMLQuantizationType[type_name]
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


def weights(n_layer: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {"token_embd.weight": rng.standard_normal((50, 64)).astype(np.float32)}
    for il in range(n_layer):
        tensors[f"blk.{il}.attn_norm.weight"] = (1 + 0.1 * rng.standard_normal(64)).astype(np.float32)
        tensors[f"blk.{il}.attn_q.weight"] = rng.standard_normal((32, 64)).astype(np.float32)
        tensors[f"blk.{il}.ffn_up.weight"] = rng.standard_normal((96, 64)).astype(np.float32)
    return tensors


def types(tensors: Mapping[str, np.ndarray], matrix: str = "Q4_0") -> dict[str, str]:
    return {name: matrix if v.ndim > 1 else "F32" for name, v in tensors.items()}


CLEAN = weights()
CHECKPOINT = Source(CLEAN)


def drift(damaged: Mapping[str, np.ndarray], matrix: str = "Q4_0", control: bool = True):
    kinds = types(damaged, matrix)
    reference = Source(CLEAN, types(CLEAN, matrix)) if control else None
    return tensor_errors(Source(damaged, kinds), CHECKPOINT, reference, FLOORS)


@pytest.mark.parametrize("matrix", ["Q4_0", "Q8_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("control", [True, False])
def test_a_clean_file_has_no_damaged_tensor(matrix: str, control: bool) -> None:
    found = drift(CLEAN, matrix, control)
    assert [t.name for t in found.tensors] == list(CLEAN)
    assert not [t.name for t in found.tensors if t.damaged]
    assert (found.missing, found.extra) == ([], [])
    unjudged = [t for t in found.tensors if not t.judged]
    assert bool(unjudged) is (not control and matrix.startswith("Q"))


def shuffled(x):
    return x[np.random.default_rng(1).permutation(len(x))]


def one_row(x):
    y = x.copy()
    y[3] = y[3][::-1]
    return y


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("blk.2.attn_q.weight", shuffled),
        ("blk.2.attn_q.weight", lambda x: x * np.float32(1.3)),
        ("token_embd.weight", one_row),
        ("blk.4.attn_norm.weight", lambda x: x - 1),
        ("blk.4.attn_norm.weight", lambda x: x * np.float32(1.001)),
    ],
)
@pytest.mark.parametrize("matrix", ["Q4_0", "Q8_0", "F32"])
def test_a_planted_fault_is_found_and_nothing_else(name: str, fault, matrix: str) -> None:
    found = drift(CLEAN | {name: fault(CLEAN[name])}, matrix)
    assert [t.name for t in found.tensors if t.damaged] == [name]


def test_one_damaged_row_of_many_is_found_by_the_row() -> None:
    rng = np.random.default_rng(0)
    big = rng.standard_normal((4000, 64)).astype(np.float32)
    bad = big.copy()
    bad[1234] = rng.standard_normal(64)
    kinds = {"token_embd.weight": "Q4_0"}
    sources = [Source({"token_embd.weight": v}, kinds) for v in (bad, big)]
    (found,) = tensor_errors(sources[0], Source({"token_embd.weight": big}), sources[1], FLOORS).tensors
    assert found.error < found.limit
    assert (found.damaged, found.far_rows, found.worst_row) == (True, 1, 1234)


@pytest.mark.parametrize("matrix", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("fault", [np.zeros_like, lambda x: x[::-1], lambda x: x * np.float32(3)])
def test_one_damaged_block_of_a_long_row_is_found(matrix: str, fault) -> None:
    big = np.random.default_rng(0).standard_normal((50, 8192)).astype(np.float32)
    bad = big.copy()
    bad[31, 512:768] = fault(bad[31, 512:768])
    kinds = {"blk.0.ffn_down.weight": matrix}
    sources = [Source({"blk.0.ffn_down.weight": v}, kinds) for v in (bad, big)]
    (found,) = tensor_errors(sources[0], Source({"blk.0.ffn_down.weight": big}), sources[1], FLOORS).tensors
    assert (found.damaged, found.far_rows, found.worst_row) == (True, 1, 31)


@pytest.mark.parametrize("matrix", ["F32", "F16", "BF16"])
def test_one_changed_value_is_found_where_nothing_but_rounding_is_lost(matrix: str) -> None:
    changed = CLEAN["blk.3.ffn_up.weight"].copy()
    changed[17, 5] += np.float32(0.05)
    found = drift(CLEAN | {"blk.3.ffn_up.weight": changed}, matrix)
    assert [(t.name, t.far_rows) for t in found.tensors if t.damaged] == [("blk.3.ffn_up.weight", 1)]


@pytest.mark.parametrize("via", ["BF16", "F16"])
def test_values_rounded_on_the_way_are_not_damaged(via: str) -> None:
    found = drift({name: through(v, via) for name, v in CLEAN.items()}, "F32")
    assert not [t.name for t in found.tensors if t.damaged]
    assert {t.note for t in found.tensors} == {f"the checkpoint's values rounded to {via}"}


def test_nan_is_counted() -> None:
    bad = CLEAN["blk.0.ffn_up.weight"].copy()
    bad[0, :32] = np.nan
    source = Source(CLEAN)
    source.values["blk.0.ffn_up.weight"] = bad
    (found,) = [t for t in tensor_errors(source, CHECKPOINT, None, FLOORS).tensors if t.non_finite]
    assert (found.name, found.non_finite, found.error, found.damaged) == ("blk.0.ffn_up.weight", 32, np.inf, True)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_checkpoint_with_nan_judges_nothing(value: float) -> None:
    broken = CLEAN | {"blk.0.ffn_up.weight": CLEAN["blk.0.ffn_up.weight"].copy()}
    broken["blk.0.ffn_up.weight"][3, 5] = value
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight holds values that are NaN"):
        tensor_errors(Source(CLEAN), Source(broken), None, FLOORS)


def test_missing_extra_and_misshapen() -> None:
    tensors = dict(CLEAN)
    del tensors["blk.0.attn_q.weight"]
    tensors["blk.0.extra.weight"] = np.ones(32, np.float32)
    tensors["blk.1.attn_q.weight"] = np.ones((4, 64), np.float32)
    found = drift(tensors, "F32")
    assert (found.missing, found.extra) == (["blk.0.attn_q.weight"], ["blk.0.extra.weight"])
    (wrong,) = [t for t in found.tensors if t.damaged]
    assert wrong.note == "shape (4, 64) in the artifact, (32, 64) in the checkpoint"


@pytest.mark.parametrize("stored_by", ["artifact", "checkpoint"])
def test_a_tied_head_may_be_stored_on_one_side_only(stored_by: str) -> None:
    both = CLEAN | {"output.weight": CLEAN["token_embd.weight"]}
    sides = (Source(both), CHECKPOINT) if stored_by == "artifact" else (CHECKPOINT, Source(both))
    found = tensor_errors(*sides, None, FLOORS)
    assert (found.missing, found.extra) == ([], [])
    head = next(t for t in found.tensors if t.name == "output.weight")
    assert head.error == 0 and not head.damaged
    other = CLEAN | {"output.weight": shuffled(CLEAN["token_embd.weight"])}
    sides = (Source(other), CHECKPOINT) if stored_by == "artifact" else (CHECKPOINT, Source(other))
    assert next(t for t in tensor_errors(*sides, None, FLOORS).tensors if t.name == "output.weight").damaged
