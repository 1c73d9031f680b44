from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffharness.engine.bindings import GgmlTensor
from diffharness.errors import EngineError
from diffharness.recorded import RecordedNode, Value
from diffharness.replay import matmul
from diffharness.replay.activation_quant import VEC_DOT_TYPE, rounded
from diffharness.replay.call import Call, NoReplay
from diffharness.replay.distance import distance
from diffharness.weights.dequant import BLOCKS, byte_size, dequantizable, dequantize
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import RawTensor, write_tensors
from tests.replay.ggml_graph import graph
from tests.replay.nodes import NoWeights
from tests.replay.nodes import replay as replayed
from tests.replay.products import Weight, of_file, rearranged, tensor, weight

FLOOR = 1e-11  # NMSE of a whole node; measured: 1e-12 at most, of every type, path and model
RNG = np.random.default_rng(11)
TYPES = [name for name in dequantizable() if name in VEC_DOT_TYPE]
BATCHES = (1, 2, 7, 64)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def heavy(*shape: int) -> NDArray[np.float32]:
    """With a few very large activations, as real ones have, and ties of rounding."""
    x = RNG.standard_t(1.5, shape)
    x[..., ::2] = np.round(x[..., ::2] * 4) / 4
    return x.astype(np.float32)


def apart(node: RecordedNode, weights: GgufFile | None = None) -> float:
    return distance(node.out.array(), replayed(node, weights or NoWeights()).numpy()).nmse


def product(w: Weight, x: NDArray[np.float32], n_threads: int = 1) -> RecordedNode:
    with graph() as g:
        return of_file(g.run(g.mul_mat(tensor(g, w), g.tensor(x)), n_threads), w)


def widths(type_name: str) -> list[int]:
    return [n for n in (96, 256, 512) if n % BLOCKS[type_name][0] == 0]


# ── ggml's own products ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("type_name", TYPES)
def test_mul_mat_of_every_type(type_name: str) -> None:
    for width in widths(type_name):
        w = weight(normal(37, width), type_name)  # rows that neither tiles nor tinyBLAS divide
        for n in BATCHES:
            for x in (normal(n, width), heavy(n, width)):
                assert apart(product(w, x, n_threads=1 + n % 2)) <= FLOOR, (width, n)


def test_products_of_repacked_weights() -> None:
    """Of every type that this build repacks: by batches, by what is left of them after fours, and by experts."""
    repacked = []
    for type_name in TYPES:
        w, stack = weight(normal(40, 512), type_name), weight(normal(6, 24, 512), type_name)
        with rearranged(w) as address, rearranged(stack) as stack_address, graph() as g:
            if address is None or stack_address is None:
                continue
            repacked.append(type_name)
            for n in BATCHES:
                for x in (normal(n, 512), heavy(n, 512)):
                    node = of_file(g.run(g.mul_mat(address, g.tensor(x))), w)
                    assert apart(node) <= FLOOR, (type_name, n)
            assert apart(routed(stack, 40, shared=False, address=stack_address)) <= FLOOR, type_name
    if not repacked:
        pytest.skip("this build repacks nothing")


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "IQ4_NL"])
def test_mul_mat_is_broadcast_over_both_outer_axes(type_name: str) -> None:
    w = weight(normal(2, 3, 20, 64), type_name)
    assert apart(product(w, normal(4, 6, 5, 64))) <= FLOOR


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q5_1"])
def test_mul_mat_of_a_view_of_a_cache(type_name: str) -> None:
    """Keys as the cache holds them: [heads, cells, 64] seen in [cells, heads * 64], with cells left out at the end."""
    cells, heads, width = 48, 2, 64
    cache = weight(normal(cells, heads * width), type_name)
    row = byte_size(type_name, (heads * width,))
    head = byte_size(type_name, (width,))
    with graph() as g:
        keys = g.view_3d(tensor(g, cache), width, 30, heads, row, head, 3 * row)
        assert apart(g.run(g.mul_mat(keys, g.tensor(heavy(4, 9, width))))) <= FLOOR


def test_mul_mat_of_permuted_activations() -> None:
    with graph() as g:
        x = g.permute(g.tensor(normal(5, 3, 64)), 0, 2, 1, 3)
        w = weight(normal(3, 20, 64), "F16")
        assert apart(of_file(g.run(g.mul_mat(tensor(g, w), x)), w)) <= FLOOR


@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_mul_mat_of_operands_that_are_not_f32(type_name: str) -> None:
    with graph() as g:
        x = tensor(g, weight(normal(9, 64), type_name))
        for w in (weight(normal(20, 64), type_name), weight(normal(20, 64), "F32")):
            assert apart(of_file(g.run(g.mul_mat(tensor(g, w), x)), w)) <= FLOOR


@pytest.mark.parametrize("type_name", ["F32", "F16"])
def test_mul_mat_by_a_hadamard_matrix_rounds_nothing(type_name: str) -> None:
    h = np.ones((1, 1), dtype=np.float32)
    while len(h) < 64:
        h = np.block([[h, h], [h, -h]])
    with graph() as g:
        address = g.mul_mat(g.tensor(h / 8), tensor(g, weight(heavy(9, 64), type_name)))
        GgmlTensor.from_address(address).op_params[1] = 1  # ggml_mul_mat_set_hint
        assert apart(g.run(address)) <= FLOOR


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "by expert"])
def test_mul_mat_id_of_every_type(type_name: str, shared: bool) -> None:
    width = widths(type_name)[-1]
    w = weight(normal(6, 24, width), type_name)
    for n in (1, 5, 40):
        assert apart(routed(w, n, shared)) <= FLOOR


def routed(w: Weight, n: int, shared: bool, address: int | None = None) -> RecordedNode:
    """Each of `n` tokens goes to 2 of the experts, with one row for both or one for each; expert 1 is never used."""
    x = heavy(n, 1 if shared else 2, w.shape[-1])
    usable = [i for i in range(w.shape[0]) if i != 1]
    ids = np.stack([RNG.permutation(usable)[:2] for _ in range(n)]).astype(np.int32)
    with graph() as g:
        return of_file(g.run(g.mul_mat_id(address or tensor(g, w), g.tensor(x), g.tensor(ids))), w)


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0"])
def test_out_prod(type_name: str) -> None:
    with graph() as g:
        w = weight(normal(2, 20, 64), type_name)
        x = g.tensor(normal(2 if type_name != "F32" else 4, 20, 9))
        assert apart(of_file(g.run(g.out_prod(tensor(g, w), x)), w)) <= FLOOR


# ── planted faults ───────────────────────────────────────────────────────────────────────────────


def altered(node: RecordedNode, rows: NDArray[np.float32]) -> RecordedNode:
    return replace(node, out=replace(node.out, raw=rows.reshape(-1).view(np.uint8)))


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0", "Q4_1", "Q4_K"])
def test_a_column_that_is_one_percent_too_large(type_name: str) -> None:
    node = product(weight(normal(200, 256), type_name), heavy(64, 256))
    out = node.out.array().copy()
    out[..., 17] *= 1.01
    assert apart(altered(node, out)) > 1e3 * FLOOR


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_K"])
def test_a_row_that_is_another_tokens(type_name: str) -> None:
    node = product(weight(normal(200, 256), type_name), normal(64, 256))
    out = node.out.array().copy()
    out[0, 0, 5] = out[0, 0, 6]
    found = distance(out, replayed(altered(node, out)).numpy())
    assert found.nmse > 1e3 * FLOOR and found.worst_row == 5


def test_a_row_that_is_another_experts() -> None:
    w = weight(normal(6, 24, 256), "Q4_K")
    node = routed(w, 40, shared=True)
    out = node.out.array().copy()
    out[0, 8, 1] = out[0, 8, 0]
    found = distance(out, replayed(altered(node, out)).numpy())
    assert found.nmse > 1e3 * FLOOR and found.worst_row == 17


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "IQ4_NL", "Q4_K", "Q6_K"])
def test_the_scale_of_one_block(type_name: str) -> None:
    """The engine takes one block's scale for a power of two more than the file has."""
    w = weight(normal(200, 256), type_name)
    at = 209 if type_name == "Q6_K" else 1  # the high byte of the scale
    wrong = replace(w, raw=w.raw.copy())
    wrong.raw[at] += 4
    node = product(wrong, normal(64, 256))
    assert apart(node) <= FLOOR
    assert apart(of_file(node, w)) > 1e3 * FLOOR


def test_activations_of_another_rounding() -> None:
    """The sum that Q8_1 stores, or the rounding itself, left out: far less than other faults, and still seen."""
    w, x = weight(normal(200, 256), "Q4_1"), normal(64, 256)
    node = product(w, x)
    matrix = torch.from_numpy(dequantize(w.raw, w.type, w.shape)).T
    for held in ("Q8_0", "F32"):
        assert apart(altered(node, (rounded(torch.from_numpy(x), held) @ matrix).numpy())) > 1e3 * FLOOR


def test_other_honest_arithmetics_pass_and_wrong_ones_do_not() -> None:
    """Rows as another processor would round them: the replay takes the arithmetic of each."""
    w, x = weight(normal(200, 256), "Q8_0"), heavy(64, 256)
    x[:] = np.round(x * 8) / 8  # ties
    node = product(w, x)
    matrix = torch.from_numpy(dequantize(w.raw, w.type, w.shape)).T
    other = (rounded(torch.from_numpy(x), "Q8_0", "by 1/scale") @ matrix).numpy()
    assert distance(other, node.out.array()[0, 0]).nmse > FLOOR
    assert apart(altered(node, other)) <= FLOOR
    other[5] *= 1.001
    assert distance(other, replayed(altered(node, other)).numpy()[0, 0]).worst_row == 5


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_terms_that_cancel(type_name: str) -> None:
    """A product of one number that is 1e-5 of its terms: what is left of it is mostly rounding, which is granted."""
    x = normal(1, 2048)
    x[:, 0] = 2.0
    row = normal(1, 2048)
    held = rounded(torch.from_numpy(row), type_name).double()
    exact = rounded(torch.from_numpy(x), type_name).double()
    terms = float((held * exact).abs().sum())
    held[0, 0] -= float((held * exact).sum()) / 2 - 1e-5 * terms
    row = np.concatenate([held.float().numpy(), held.float().numpy()])
    if type_name != "F32":  # whose rows cannot hold the entry that makes them cancel
        row[:, 0] = 0
    node = product(weight(row, type_name), x)
    assert apart(node) <= FLOOR
    for wrong in (node.out.array() + 1e-5 * terms, node.out.array() * np.nan):
        assert not apart(altered(node, np.array(wrong, dtype=np.float32))) <= 1e3 * FLOOR


# ── weights of the file ──────────────────────────────────────────────────────────────────────────


def file_of(path: Path, *tensors: tuple[str, Weight]) -> GgufFile:
    kvs = {"general.architecture": encode_value("general.architecture", "llama")}
    write_tensors(path, kvs, [RawTensor(name, w.shape, w.type, lambda w=w: [w.raw]) for name, w in tensors])
    return open_gguf(path)


def in_file(node: RecordedNode, name: str, **changes: Any) -> RecordedNode:
    first = node.sources[0]
    assert first is not None
    return replace(node, sources=(replace(first, raw=None, name=name, **changes), *node.sources[1:]))


@pytest.mark.parametrize("type_name", ["F32", "Q4_1", "Q4_K"])
def test_weights_are_read_from_the_file_in_pieces(
    type_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_PIECE", 7 * 256)
    w, stack = weight(normal(50, 256), type_name), weight(normal(4, 24, 256), type_name)
    with file_of(tmp_path / "m.gguf", ("a.weight", w), ("b.weight", stack)) as file:
        assert apart(in_file(product(w, normal(9, 256)), "a.weight"), file) <= FLOOR
        assert apart(in_file(routed(stack, 9, shared=True), "b.weight"), file) <= FLOOR


def test_a_view_of_a_weight(tmp_path: Path) -> None:
    w = weight(normal(50, 256), "Q8_0")
    row = byte_size("Q8_0", (256,))
    with graph() as g, file_of(tmp_path / "m.gguf", ("a.weight", w)) as file:
        half = g.view_2d(tensor(g, w), 256, 20, row, 10 * row)
        node = g.run(g.mul_mat(half, g.tensor(normal(9, 256))))
        assert node.sources[0] is not None and node.sources[0].offset == 10 * row
        assert apart(in_file(node, "a.weight"), file) <= FLOOR
        assert apart(in_file(node, "a.weight", offset=0), file) > 1e-2


def test_only_routed_experts_are_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, read = weight(normal(6, 24, 256), "Q8_0"), []
    real = matmul.dequantize

    def watched(raw: NDArray[np.uint8], type_name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        read.append(shape)
        return real(raw, type_name, shape)

    monkeypatch.setattr(matmul, "dequantize", watched)
    with file_of(tmp_path / "m.gguf", ("b.weight", stack)) as file:
        replayed(in_file(routed(stack, 1, shared=True), "b.weight"), file)
    assert read == [(24, 256)] * 2


def test_what_contradicts_the_file(tmp_path: Path) -> None:
    w = weight(normal(50, 256), "Q8_0")
    node = product(w, normal(3, 256))
    with file_of(tmp_path / "m.gguf", ("a.weight", w)) as file:
        with pytest.raises(EngineError, match="does not have"):
            replayed(in_file(node, "c.weight"), file)
        with pytest.raises(EngineError, match=r"as F16, m\.gguf as Q8_0"):
            replayed(in_file(node, "a.weight", type="F16"), file)
        with pytest.raises(EngineError, match="reaches to byte"):
            replayed(in_file(node, "a.weight", shape=(1, 1, 51, 256)), file)


def test_what_cannot_be_replayed() -> None:
    node = product(weight(normal(50, 256), "F32"), normal(3, 256))
    with pytest.raises(NoReplay, match="only be read from the GGUF file"):
        replayed(in_file(node, "a.weight"))
    x = Value("x", "Q8_K", (1, 1, 1, 256), (292, 292, 292, 292), np.zeros(292, dtype=np.uint8))
    with pytest.raises(NoReplay, match="of type Q8_K"):
        replayed(replace(node, sources=(x, node.sources[1])))


def test_an_expert_that_there_is_not() -> None:
    node = routed(weight(normal(6, 24, 256), "F32"), 3, shared=True)
    ids = node.sources[2]
    assert ids is not None and ids.raw is not None
    wrong = np.full(6, 6, dtype=np.int32).view(np.uint8)
    with pytest.raises(EngineError, match=r"experts \[6\] of 6"):
        replayed(replace(node, sources=(*node.sources[:2], replace(ids, raw=wrong))))


def test_nothing_but_the_inputs_is_asked_for() -> None:
    """Without the engine's output the usual arithmetic is taken."""
    w, x = weight(normal(50, 256), "Q8_0"), normal(3, 256)
    node = product(w, x)
    blind = replace(node, out=replace(node.out, raw=None))
    result = matmul.KERNELS["MUL_MAT"](Call(blind, NoWeights()))
    assert isinstance(result, torch.Tensor)
    assert distance(node.out.array(), result.numpy()).nmse <= FLOOR
