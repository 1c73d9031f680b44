"""What damaged values are: faults of known kind in tiny models of several architectures and types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness.engine.quantizer import Quantizer
from diffharness.forensics.control import Control
from diffharness.forensics.drift import tensor_errors
from diffharness.forensics.heads import Heads
from diffharness.forensics.relations import find_relations
from diffharness.records.inspect import PatternRow
from diffharness.settings import load_engine, load_tolerances
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.dequant import BLOCKS
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import rewrite_gguf
from diffharness.weights.names._map import RotaryPairs
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.conftest import make_pair as make_pair
from tests.oracles.conftest import make_tiny as make_tiny

Values = np.ndarray[Any, np.dtype[np.float32]]
Read = Callable[[str], Values]
Change = Callable[[Values, str, Read], Values]
TOLERANCES = load_tolerances()
FLOORS = {name: TOLERANCES[name] for name in TOLERANCES.floors}


@pytest.fixture(scope="module")
def quantizer() -> Iterator[Quantizer]:
    with Quantizer(load_engine("native").changed(threads=1)) as made:
        yield made


class Bench:
    """Copies of one pair with values changed before they are quantized, or bytes after, and what is said of them."""

    def __init__(self, pair: Pair, out: Path, quantizer: Quantizer) -> None:
        self.pair, self.out, self.quantizer = pair, out, quantizer
        self.checkpoint = Checkpoint(pair.checkpoint)

    def values(self, pattern: str, change: Change) -> list[PatternRow]:
        def tensor(info: Any, raw: Any) -> Any:
            if not fnmatchcase(info.name, pattern):
                return None
            values = change(self.checkpoint.read(info.name), info.name, self.checkpoint.read)
            rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, values.shape[-1])
            return info.type, values.shape, self.quantizer.quantize(rows, info.type).reshape(-1).view(np.uint8)

        return self._found(tensor)

    def bytes(self, pattern: str, change: Callable[[Any], Any]) -> list[PatternRow]:
        def tensor(info: Any, raw: Any) -> Any:
            if not fnmatchcase(info.name, pattern):
                return None
            data = np.array(raw).reshape(-1).view(np.uint8).copy()
            changed = change(data)
            return info.type, info.shape, data if changed is None else changed

        return self._found(tensor)

    def _found(self, tensor: Any) -> list[PatternRow]:
        with open_gguf(self.pair.gguf) as source:
            rewrite_gguf(source, self.out, tensor=tensor)
        with open_gguf(self.out) as artifact:
            control = Control(self.checkpoint, artifact, self.quantizer.quantize)
            every = tensor_errors(artifact, self.checkpoint, control, FLOORS).tensors
            damaged = [t for t in every if t.damaged or t.non_finite]
            rows = find_relations(damaged, artifact, self.checkpoint, every)
            told = [name for row in rows for name in row.tensors]
            assert sorted(told) == sorted(t.name for t in damaged), "every damaged tensor once"
            return rows


@pytest.fixture
def bench(make_pair: MakePair, tmp_path: Path, quantizer: Quantizer) -> Callable[[str, str], Bench]:
    return lambda case, type_name: Bench(make_pair(case, type_name), tmp_path / "damaged.gguf", quantizer)


MakeBench = Callable[[str, str], Bench]


def only(rows: list[PatternRow], kind: str) -> PatternRow:
    assert [row.kind for row in rows] == [kind], [(row.kind, row.message) for row in rows]
    print(rows[0].kind, "|", rows[0].message)
    return rows[0]


def shuffled(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).permutation(n)


TYPES = ("F32", "Q4_K")  # values kept, and the type that most files have; `test_two_bits` has what is left at the end


@pytest.mark.parametrize("type_name", ["F32", "BF16", "Q4_K", "Q2_K"])
@pytest.mark.parametrize("case", ["llama", "gemma4", "qwen3moe"])
def test_a_clean_file_has_no_rows(bench: MakeBench, case: str, type_name: str) -> None:
    assert bench(case, type_name).values("nothing", lambda v, *_: v) == []


# -- value by value ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("factor", [2.0, 0.25])
def test_scale(bench: MakeBench, type_name: str, factor: float) -> None:
    row = only(bench("llama", type_name).values("blk.[12].attn_v.weight", lambda v, *_: v * factor), "scale")
    assert row.tensors == ["blk.1.attn_v.weight", "blk.2.attn_v.weight"]
    assert row.evidence["scale"] == pytest.approx(factor, rel=0.02) and row.evidence["complete"]


def test_a_factor_for_each_tensor_is_one_row(bench: MakeBench) -> None:
    factors = {
        f"blk.{il}.{k}.weight": 1.5 + 0.3 * il + i for il in range(3) for i, k in enumerate(("ffn_up", "attn_q"))
    }
    row = only(
        bench("llama", "Q8_0").values("blk.*", lambda v, name, read: v * factors.get(name, 1.0)),
        "scale",
    )
    assert set(row.tensors) == set(factors)
    for name, evidence in row.evidence["by_tensor"].items():
        assert evidence["scale"] == pytest.approx(factors[name], rel=0.01)


@pytest.mark.parametrize("type_name", TYPES)
def test_sign(bench: MakeBench, type_name: str) -> None:
    only(bench("llama", type_name).values("blk.1.ffn_up.weight", lambda v, *_: -v), "sign_flip")


@pytest.mark.parametrize("by", [-1.0, 1.0, 0.37])
def test_norm_off_by_one(bench: MakeBench, by: float) -> None:
    row = only(bench("gemma3", "Q8_0").values("blk.*.attn_norm.weight", lambda v, *_: v + by), "offset")
    assert row.evidence["offset"] == pytest.approx(by, abs=1e-5) and len(row.tensors) == 7
    assert "attn_norm in every layer: the checkpoint's values" in row.message


@pytest.mark.parametrize("type_name", TYPES)
def test_scale_and_offset(bench: MakeBench, type_name: str) -> None:
    rows = bench("llama", type_name).values("blk.1.ffn_up.weight", lambda v, *_: 2 * v + v.std())
    row = only(rows, "scale_offset")
    assert row.evidence["scale"] == pytest.approx(2.0, rel=0.03)


def test_constants(bench: MakeBench) -> None:
    row = only(
        bench("gemma4", "Q8_0").values("blk.*.layer_output_scale.weight", lambda v, *_: np.ones_like(v)), "constant"
    )
    assert row.evidence["value"] == 1.0 and row.message == "layer_output_scale in every layer: every value is 1"
    row = only(bench("gemma4", "Q8_0").values("blk.2.attn_norm.weight", lambda v, *_: np.ones_like(v)), "constant")
    assert row.evidence["value"] == 1.0
    only(bench("llama", "Q4_K").values("blk.2.attn_k.weight", lambda v, *_: np.zeros_like(v)), "zeroed")


def test_scalars_all_times_the_same(bench: MakeBench) -> None:
    row = only(bench("gemma4", "Q8_0").values("blk.*.layer_output_scale.weight", lambda v, *_: v * 3), "scale")
    assert row.evidence["scale"] == pytest.approx(3.0)


@pytest.mark.parametrize("type_name", TYPES)
def test_clipped(bench: MakeBench, type_name: str) -> None:
    row = only(
        bench("llama", type_name).values("blk.1.ffn_up.weight", lambda v, *_: v.clip(-v.std(), v.std())), "clipped"
    )
    assert row.evidence["values"] > 1000


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_scaled_rows_and_columns(bench: MakeBench, type_name: str, axis: int) -> None:
    factors = 1 + np.random.default_rng(0).random(512 if type_name != "F32" else 96).astype(np.float32)

    def change(v: Values, *_: object) -> Values:
        n = v.shape[axis]
        return v * (factors[:n, None] if axis == 0 else factors[None, :n])

    kind = "scaled_rows" if axis == 0 else "scaled_columns"
    only(bench("llama", type_name).values("blk.1.ffn_up.weight", change), kind)


def test_one_expert_scaled(bench: MakeBench) -> None:
    def change(v: Values, *_: object) -> Values:
        v = v.copy()
        v[3] *= 1.6
        return v

    row = only(bench("mixtral", "Q4_K").values("blk.1.ffn_down_exps.weight", change), "scaled_rows")
    assert row.evidence["experts"] == [3] and "expert 3 times 1." in row.message


# -- moved about ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", TYPES)
def test_rotary_permutation_left_out(bench: MakeBench, type_name: str) -> None:
    """llama's Q and K as Hugging Face has them."""
    made = bench("llama", type_name)
    heads = {"attn_q": 8, "attn_k": 2}
    rows = made.values(
        "blk.*.attn_[qk].weight", lambda v, name, read: RotaryPairs(heads[name.split(".")[2]]).to_hf(v)[0]
    )
    row = only(rows, "rotary_order")
    assert row.evidence["order"] == "half_split" and len(row.tensors) == 6 and "missing or undone" in row.message


@pytest.mark.parametrize("type_name", ["F32", "Q4_K"])
def test_rotary_permutation_with_the_wrong_heads(bench: MakeBench, type_name: str) -> None:
    """llama.cpp #3364: K permuted as if it had as many heads as Q."""

    def change(v: Values, *_: object) -> Values:
        [plain] = RotaryPairs(2).to_hf(v)
        return RotaryPairs(8).to_gguf([plain])

    row = only(bench("llama", type_name).values("blk.*.attn_k.weight", change), "rotary_order")
    assert (row.evidence["order"], row.evidence["heads"], row.evidence["heads_used"]) == ("wrong_heads", 2, 8)


def test_rotary_permutation_where_none_belongs(bench: MakeBench) -> None:
    rows = bench("qwen3moe", "Q4_K").values("blk.1.attn_q.weight", lambda v, *_: RotaryPairs(8).to_gguf([v]))
    assert only(rows, "rotary_order").evidence["order"] == "interleaved"


@pytest.mark.parametrize("type_name", TYPES)
def test_permuted_rows(bench: MakeBench, type_name: str) -> None:
    row = only(
        bench("llama", type_name).values("blk.1.ffn_up.weight", lambda v, *_: v[shuffled(len(v))]), "permuted_rows"
    )
    assert row.evidence["moved"] > 90
    order = shuffled(row.evidence["n"])
    assert row.evidence["from"] == order[row.evidence["places"]].tolist()


def test_two_rows_of_a_large_tensor(bench: MakeBench) -> None:
    def change(v: Values, *_: object) -> Values:
        v = v.copy()
        v[[17, 200]] = v[[200, 17]]
        return v

    row = only(bench("llama", "Q4_K").values("token_embd.weight", change), "permuted_rows")
    assert row.evidence["places"] == [17, 200] and "rows 17 and 200 exchanged" in row.message


def test_rows_displaced(bench: MakeBench) -> None:
    row = only(bench("llama", "Q4_K").values("token_embd.weight", lambda v, *_: np.roll(v, 3, axis=0)), "permuted_rows")
    assert row.evidence["shift"] == -3 and "displaced by +3" in row.message


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("klass", ["attn_q", "attn_output"])
def test_permuted_heads(bench: MakeBench, type_name: str, klass: str) -> None:
    order = shuffled(8)

    def change(v: Values, *_: object) -> Values:
        rows = v if klass == "attn_q" else v.T
        moved = rows.reshape(8, -1, rows.shape[1])[order].reshape(rows.shape)
        return moved if klass == "attn_q" else moved.T

    row = only(bench("qwen3", type_name).values(f"blk.1.{klass}.weight", change), "permuted_heads")
    moved = [i for i in range(8) if order[i] != i]
    assert row.evidence["places"] == moved and row.evidence["from"] == order[moved].tolist()


@pytest.mark.parametrize("type_name", TYPES)
def test_permuted_experts(bench: MakeBench, type_name: str) -> None:
    order = shuffled(6, 1)
    rows = bench("qwen3moe", type_name).values("blk.1.ffn_*_exps.weight", lambda v, *_: v[order])
    row = only(rows, "permuted_experts")
    assert len(row.tensors) == 3 and f"order {', '.join(map(str, order))}" in row.message


def test_permuted_router(bench: MakeBench) -> None:
    rows = bench("qwen3moe", "Q8_0").values("blk.1.ffn_gate_inp.weight", lambda v, *_: v[[1, 0, 2, 3, 4, 5]])
    assert "experts 0 and 1 exchanged" in only(rows, "permuted_experts").message


@pytest.mark.parametrize("type_name", TYPES)
def test_permuted_columns(bench: MakeBench, type_name: str) -> None:
    rows = bench("llama", type_name).values("blk.1.ffn_down.weight", lambda v, *_: v[:, shuffled(v.shape[1])])
    only(rows, "permuted_columns")


@pytest.mark.parametrize("type_name", TYPES)
def test_transposed(bench: MakeBench, type_name: str) -> None:
    """A square one, and one that is not, in order of columns under the shape it should have."""
    made = bench("llama-square", type_name)
    assert only(made.values("blk.1.attn_q.weight", lambda v, *_: v.T), "transposed").message.endswith(": transposed")
    row = only(made.values("blk.2.ffn_up.weight", lambda v, *_: v.T.copy().reshape(v.shape)), "transposed")
    assert "stored transposed" in row.message
    only(made.values("blk.2.ffn_up.weight", lambda v, *_: v.reshape(v.shape[::-1]).T), "transposed")


def test_shape_turned(bench: MakeBench) -> None:
    row = only(bench("llama", "F32").values("blk.1.ffn_up.weight", lambda v, *_: v.T), "transposed")
    assert "its shape too" in row.message
    row = only(bench("llama", "F32").values("blk.1.ffn_up.weight", lambda v, *_: v[:40]), "shape")
    assert "another shape: [40, 64]" in row.message


# -- other tensors ----------------------------------------------------------------------------------------


def swap(one: str, two: str) -> Change:
    def change(v: Values, name: str, read: Read) -> Values:
        return read(name.replace(one, two) if one in name else name.replace(two, one))

    return change


@pytest.mark.parametrize("type_name", TYPES)
def test_gate_and_up_exchanged(bench: MakeBench, type_name: str) -> None:
    rows = bench("llama", type_name).values("blk.[12].ffn_[gu]*.weight", swap("ffn_gate", "ffn_up"))
    row = only(rows, "gate_up_exchanged")
    assert row.evidence["layers"] == [1, 2] and len(row.tensors) == 4
    assert row.message == "gate and up exchanged in layers 1, 2"


def test_gate_and_up_of_experts(bench: MakeBench) -> None:
    rows = bench("mixtral", "Q4_K").values(
        "blk.1.ffn_*_exps.weight",
        lambda v, name, read: swap("gate_", "up_")(v, name, read) if "down" not in name else v,
    )
    assert only(rows, "gate_up_exchanged").evidence["layers"] == [1]


def test_q_and_k_exchanged(bench: MakeBench, make_pair: MakePair) -> None:
    """Of equal shapes, as in models without grouped queries; elsewhere the shapes tell."""
    rows = bench("llama", "Q8_0").values("blk.1.attn_[kv].weight", swap("attn_k", "attn_v"))
    assert only(rows, "k_v_exchanged").evidence["layers"] == [1]


@pytest.mark.parametrize("type_name", TYPES)
def test_permuted_layers(bench: MakeBench, type_name: str) -> None:
    order = {0: 2, 1: 0, 2: 1}

    def change(v: Values, name: str, read: Read) -> Values:
        _, il, rest = name.split(".", 2)
        return read(f"blk.{order[int(il)]}.{rest}")

    row = only(bench("llama", type_name).values("blk.*", change), "permuted_layers")
    assert row.evidence["layer_map"] == {"0": 2, "1": 0, "2": 1} and len(row.tensors) == 27


def test_two_layers_of_one_class(bench: MakeBench) -> None:
    def change(v: Values, name: str, read: Read) -> Values:
        return read(name.replace(".0.", ".x.").replace(".2.", ".0.").replace(".x.", ".2."))

    row = only(bench("gemma3", "Q4_K").values("blk.[02].ffn_down.weight", change), "permuted_layers")
    assert row.message == "layers 0 and 2 exchanged (ffn_down)"


def test_scalars_follow_their_layer(bench: MakeBench) -> None:
    def change(v: Values, name: str, read: Read) -> Values:
        return read(name.replace(".1.", ".x.").replace(".0.", ".1.").replace(".x.", ".0."))

    row = only(bench("gemma4", "Q8_0").values("blk.[01].*", change), "permuted_layers")
    assert "blk.1.layer_output_scale.weight" in row.tensors


@pytest.mark.parametrize("type_name", TYPES)
def test_duplicated_tensor(bench: MakeBench, type_name: str) -> None:
    rows = bench("llama", type_name).values("blk.2.attn_q.weight", lambda v, name, read: read("blk.1.attn_q.weight"))
    row = only(rows, "duplicated")
    assert row.evidence["from"] == {"blk.2.attn_q.weight": "blk.1.attn_q.weight"}


def test_repeated_layer(bench: MakeBench) -> None:
    rows = bench("llama", "Q4_K").values("blk.2.*", lambda v, name, read: read(name.replace(".2.", ".1.")))
    row = only(rows, "repeated_layers")
    assert row.evidence["layer_map"] == {"2": 1} and len(row.tensors) == 9


# -- blocks and bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_K"])
def test_zeroed_blocks(bench: MakeBench, type_name: str) -> None:
    def change(v: Values, *_: object) -> Values:
        v = v.copy()
        v.reshape(-1)[512:1024] = 0
        return v

    row = only(bench("llama", type_name).values("blk.1.ffn_down.weight", change), "zeroed_blocks")
    size = max(32, BLOCKS[type_name][0] if BLOCKS[type_name][0] > 1 else 32)
    assert row.evidence["blocks"] == 512 // size and row.evidence["places"][0] == 512 // size


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("factor", [2.0])
def test_wrong_block_scales(bench: MakeBench, type_name: str, factor: float) -> None:
    _, size = BLOCKS[type_name]
    at = {"Q8_0": 0, "Q4_K": 0, "Q6_K": 208}[type_name]

    def change(data: Any) -> None:
        scales = data.reshape(-1, size)[5:9, at : at + 2]
        scales[...] = (np.ascontiguousarray(scales).view(np.float16) * np.float16(factor)).view(np.uint8)

    row = only(bench("llama", type_name).bytes("blk.1.ffn_down.weight", change), "block_scales")
    assert row.evidence["blocks"] == 4
    assert np.allclose(row.evidence["factors"], factor, rtol=0.05)


@pytest.mark.parametrize(("type_name", "bit"), [("F32", 30), ("F32", 20), ("BF16", 14), ("F16", 12)])
def test_flipped_bits(bench: MakeBench, type_name: str, bit: int) -> None:
    width = 4 if type_name == "F32" else 2

    def change(data: Any) -> None:
        for i in (100, 2000):
            data[i * width + bit // 8] ^= 1 << bit % 8

    rows = bench("llama", type_name).bytes("blk.1.ffn_down.weight", change)
    assert only(rows, "flipped_bits").evidence["bits"] == [bit]


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K"])
def test_isolated_blocks(bench: MakeBench, type_name: str) -> None:
    def change(data: Any) -> None:
        size = BLOCKS[type_name][1]
        data[size * 3 + 16 : size * 4] = np.random.default_rng(0).integers(0, 256, size - 16)

    row = only(bench("llama", type_name).bytes("blk.1.ffn_down.weight", change), "isolated_blocks")
    assert row.evidence["places"] == [3]


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("shift", [1, -2, 32])
def test_displaced_bytes(bench: MakeBench, type_name: str, shift: int) -> None:
    rows = bench("llama", type_name).bytes("blk.1.ffn_down.weight", lambda data: np.roll(data, shift))
    row = only(rows, "displaced_bytes")
    assert row.evidence["bytes"] == shift


@pytest.mark.parametrize("became", ["infinite", "65504"])
@pytest.mark.parametrize("type_name", ["F16", "F32"])
def test_float16_overflow(make_pair: MakePair, tmp_path: Path, type_name: str, became: str) -> None:
    """bfloat16 values beyond float16's range; the checkpoint is in memory, as no tiny model has any."""
    from tests.weights.tiny import MemorySource

    random = np.random.default_rng(0)
    large = random.standard_normal((64, 64)).astype(np.float32)
    large[3, 5], large[40, 1] = 1e5, -3e38
    limited = large.clip(-65504, 65504)
    if became == "infinite":
        with np.errstate(over="ignore"):
            limited = large.astype(np.float16).astype(np.float32)
    said = {"general.architecture": "llama"}
    checkpoint = MemorySource("llama", said, {"blk.0.ffn_up.weight": large})
    artifact = MemorySource("llama", said, {"blk.0.ffn_up.weight": limited})
    every = tensor_errors(artifact, checkpoint, None, FLOORS).tensors
    row = only(find_relations(every, artifact, checkpoint, every), "float16_overflow")
    assert row.evidence["values"] == 2 and row.evidence["became"] == became


def small(v: Values, *_: object) -> Values:
    return np.where(np.abs(v) < 0.5 * v.std(), 0, v)


@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
def test_small_values_zeroed(bench: MakeBench, type_name: str) -> None:
    row = only(bench("llama", type_name).values("blk.1.ffn_up.weight", small), "small_zeroed")
    assert row.evidence["values"] > 1000


def test_nan_among_sound_values(bench: MakeBench) -> None:
    def change(v: Values, *_: object) -> Values:
        v = v.copy()
        v[3] = np.nan
        return v

    row = only(bench("llama", "F32").values("blk.1.ffn_norm.weight", change), "non_finite")
    assert row.evidence["values"] == 1


def test_norms_alike_are_not_taken_for_each_other(bench: MakeBench) -> None:
    """Off by one, a norm is nearer to others that are about two than to its own."""
    rows = bench("gemma3", "Q8_0").values("*norm.weight", lambda v, *_: v + 1)
    assert only(rows, "offset").evidence["offset"] == 1.0


# -- at two bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pattern", "change"),
    [
        ("scale", "blk.1.attn_v.weight", lambda v, *_: v * 2),
        ("scaled_rows", "blk.1.ffn_up.weight", lambda v, *_: v * (1 + np.random.default_rng(0).random((len(v), 1)))),
        ("permuted_rows", "blk.1.ffn_up.weight", lambda v, *_: v[shuffled(len(v))]),
        ("permuted_columns", "blk.1.ffn_down.weight", lambda v, *_: v[:, shuffled(v.shape[1])]),
        ("rotary_order", "blk.1.attn_q.weight", lambda v, *_: RotaryPairs(8).to_hf(v)[0]),
        ("transposed", "blk.1.ffn_up.weight", lambda v, *_: v.T.copy().reshape(v.shape)),
        ("duplicated", "blk.2.attn_q.weight", lambda v, name, read: read("blk.1.attn_q.weight")),
        ("gate_up_exchanged", "blk.1.ffn_[gu]*.weight", lambda *given: swap("ffn_gate", "ffn_up")(*given)),
        ("unrelated", "blk.1.ffn_up.weight", lambda v, *_: np.random.default_rng(3).normal(0, v.std(), v.shape)),
    ],
)
def test_two_bits(bench: MakeBench, kind: str, pattern: str, change: Change) -> None:
    only(bench("llama", "Q2_K").values(pattern, change), kind)


# -- nothing explains it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("level", [0.3, 0.8])
def test_noise_is_noise(bench: MakeBench, type_name: str, level: float) -> None:
    random = np.random.default_rng(0)
    state = random.bit_generator.state

    def change(v: Values, *_: object) -> Values:
        random.bit_generator.state = state  # called twice, the same both times
        return v + random.normal(0, level * v.std(), v.shape)

    row = only(bench("llama", type_name).values("blk.1.ffn_[gud]*.weight", change), "noise")
    assert len(row.tensors) == 3
    assert "unexplained: noise at SQNR" in row.message


@pytest.mark.parametrize("type_name", TYPES)
def test_another_models_values_are_unrelated(bench: MakeBench, type_name: str) -> None:
    def change(v: Values, *_: object) -> Values:
        return np.random.default_rng(3).normal(0, v.std(), v.shape)

    only(bench("llama", type_name).values("blk.1.ffn_up.weight", change), "unrelated")


def test_two_faults_are_two_rows(bench: MakeBench) -> None:
    """As in unsloth #6056: scalars replaced, matrices perturbed."""

    def change(v: Values, name: str, read: Read) -> Values:
        if "layer_output_scale" in name:
            return np.ones_like(v)
        if int(name.split(".")[1]) < 2 or v.ndim < 2:
            return v
        return v + np.random.default_rng(1).normal(0, 0.7 * v.std(), v.shape)

    first, second = bench("gemma4", "Q8_0").values("blk.*", change)
    assert (first.kind, second.kind) == ("constant", "noise")
    assert len(second.tensors) > 12


def test_large_tensors_are_sampled_first(monkeypatch: pytest.MonkeyPatch, bench: MakeBench) -> None:
    monkeypatch.setattr("diffharness.forensics.relations._LARGE", 1000)
    made = bench("llama", "Q4_K")
    random = lambda v: np.random.default_rng(0).normal(0, 0.5 * v.std(), v.shape)  # noqa: E731
    only(made.values("blk.1.ffn_up.weight", lambda v, *_: v + random(v)), "noise")
    only(made.values("blk.1.ffn_up.weight", lambda v, *_: v * 1.5), "scale")
    only(made.values("blk.1.ffn_up.weight", lambda v, *_: v[shuffled(len(v))]), "permuted_rows")


def test_a_class_is_not_searched_in_vain_for_ever(monkeypatch: pytest.MonkeyPatch, bench: MakeBench) -> None:
    monkeypatch.setattr("diffharness.forensics.relations._LARGE", 1000)
    monkeypatch.setattr("diffharness.forensics.relations._IN_VAIN", 1)

    def change(v: Values, *_: object) -> Values:
        return np.random.default_rng(3).normal(0, v.std(), v.shape)

    row = only(bench("llama", "Q4_K").values("blk.*.ffn_up.weight", change), "unrelated")
    sampled = ["rows_sampled" in evidence for evidence in row.evidence["by_tensor"].values()]
    assert sampled == [False, True, True]


def test_heads_are_read(bench: MakeBench) -> None:
    assert Heads.of(bench("llama", "F32").checkpoint.metadata).counts(1) == (8, 2)
