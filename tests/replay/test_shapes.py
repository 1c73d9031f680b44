from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from diffharness.errors import EngineError
from diffharness.recorded import RecordedNode
from diffharness.replay.call import Call
from diffharness.replay.shapes import KERNELS
from tests.replay.ggml_graph import graph
from tests.replay.nodes import NoWeights, node, params, replay, weight
from tests.replay.oracle import agrees, distance

RNG = np.random.default_rng(19)
X = RNG.standard_normal((2, 3, 5, 64)).astype(np.float32)
EXACT = 0.0


def i32(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


# -- copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"])
def test_copies_into_another_type(kind: str) -> None:
    with graph() as g:
        agrees(g, g.cpy(g.tensor(X), g.tensor(np.zeros_like(X), kind)), EXACT)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_copies_out_of_another_type(kind: str) -> None:
    wide = RNG.standard_normal((3, 5, 256)).astype(np.float32)
    with graph() as g:
        agrees(g, g.cpy(g.tensor(wide, kind), g.tensor(wide)), EXACT)
        agrees(g, g.cast(g.tensor(wide, kind), 0), EXACT)


def test_copies_of_permuted_and_narrowed_views() -> None:
    with graph() as g:
        x = g.tensor(X)
        agrees(g, g.cont(g.permute(x, 2, 0, 1, 3)), EXACT)
        agrees(g, g.cont(g.transpose(x)), EXACT)
        agrees(g, g.cont(g.view_3d(x, 16, 5, 3, 256, 1280, 128)), EXACT)
        agrees(g, g.cont_2d(g.permute(x, 0, 2, 1, 3), 192, 10), EXACT)
        agrees(g, g.cpy(g.permute(x, 1, 0, 2, 3), g.tensor(np.zeros((10, 192), np.float32))), EXACT)
        agrees(g, g.dup(g.permute(x, 0, 2, 1, 3)), EXACT)
        agrees(g, g.cont(g.permute(g.tensor(X, "F16"), 1, 2, 0, 3)), EXACT)


def test_copies_of_integers() -> None:
    whole = np.arange(24, dtype=np.int32).reshape(4, 6) + (1 << 25)
    with graph() as g:
        agrees(g, g.cont(g.transpose(g.tensor(whole))), EXACT)
        agrees(g, g.cpy(g.tensor(whole), g.tensor(np.zeros((4, 6), np.float32))), EXACT)
        agrees(g, g.cast(g.tensor(X * 9), 26), EXACT)


def test_a_copy_into_a_part_of_a_larger_tensor() -> None:
    with graph() as g:
        place = g.view_2d(g.tensor(np.zeros((9, 64), np.float32)), 64, 5, 256, 512)
        agrees(g, g.cpy(g.tensor(X[0, 0]), place), EXACT)


# -- put together, repeated, moved ---------------------------------------------------------------------


def test_repeats() -> None:
    with graph() as g:
        agrees(g, g.repeat(g.tensor(X[:1, :, :1]), g.tensor(X)), EXACT)
        agrees(g, g.repeat_4d(g.tensor(X), 128, 5, 6, 2), EXACT)
        agrees(g, g.repeat_back(g.tensor(X), g.tensor(X[:1, :, :1])))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_concat(dim: int) -> None:
    other = np.repeat(X, 2, axis=3 - dim)
    with graph() as g:
        agrees(g, g.concat(g.tensor(X), g.tensor(other), dim), EXACT)
        agrees(g, g.concat(g.permute(g.tensor(X), 0, 2, 1, 3), g.permute(g.tensor(X), 0, 2, 1, 3), dim), EXACT)
        agrees(g, g.concat(g.tensor(np.ones_like(X, np.int32)), g.tensor(np.zeros_like(X, np.int32)), dim), EXACT)


def test_padding_and_rolling() -> None:
    with graph() as g:
        agrees(g, g.pad(g.tensor(X), 3, 2, 0, 1), EXACT)
        agrees(g, g.pad_ext(g.tensor(X), 1, 2, 3, 0, 1, 1, 0, 2), EXACT)
        agrees(g, g.pad_ext_circular(g.tensor(X), 1, 2, 3, 0, 1, 1, 0, 2), EXACT)
        agrees(g, g.pad_reflect_1d(g.tensor(X), 5, 9), EXACT)
        agrees(g, g.roll(g.tensor(X), 3, -2, 1, 0), EXACT)


def test_triangles() -> None:
    square = X[0, :, :, :5].copy()
    with graph() as g:
        for kind in range(4):
            agrees(g, g.tri(g.tensor(square), kind), EXACT)
        agrees(g, g.diag(g.tensor(X[0, :, :1].copy())), EXACT)
        for op in (g.diag_mask_inf, g.diag_mask_zero):
            agrees(g, op(g.tensor(X), 2), EXACT)


@pytest.mark.parametrize("op", ["set", "acc"])
def test_a_piece_laid_into_another_tensor(op: str) -> None:
    with graph() as g:
        agrees(
            g, getattr(g, op)(g.tensor(X), g.tensor(X[:1, :2, :3, :16].copy()), 256, 1280, 3840, 1280 + 256 + 64), EXACT
        )
        agrees(g, getattr(g, f"{op}_inplace")(g.tensor(X), g.tensor(X[0, 0, :2]), 512, 1280, 3840, 256), EXACT)


# -- rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_rows_of_a_matrix(kind: str) -> None:
    table = RNG.standard_normal((30, 256)).astype(np.float32)
    with graph() as g:
        agrees(g, g.get_rows(g.tensor(table, kind), g.tensor(i32(29, 0, 3, 3, 7))), EXACT)


def test_rows_of_several_matrices_and_of_integers() -> None:
    ids = RNG.integers(0, 5, (2, 3, 4)).astype(np.int32)
    with graph() as g:
        agrees(g, g.get_rows(g.tensor(X), g.tensor(ids)), EXACT)
        agrees(g, g.get_rows(g.permute(g.tensor(X), 0, 2, 1, 3), g.tensor(ids[:, :1].repeat(5, 1) % 3)), EXACT)
        agrees(g, g.get_rows(g.tensor(np.arange(40, dtype=np.int32).reshape(10, 4)), g.tensor(i32(1, 9))), EXACT)


def test_rows_of_a_tensor_of_the_file_are_read_alone() -> None:
    table = RNG.standard_normal((9, 4)).astype(np.float32)

    class OnlyRows(NoWeights):
        def read(self, name: str) -> NDArray[np.float32]:
            raise AssertionError("the whole table was read")

    file = OnlyRows(**{"token_embd.weight": table})
    recorded = node("GET_ROWS", (3, 4), weight("token_embd.weight", (9, 4)), i32(8, 2, 8))
    assert np.array_equal(replay(recorded, file)[0, 0], table[[8, 2, 8]])


@pytest.mark.parametrize("index", [np.int64, np.int32])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"])
def test_rows_written_to_a_cache(kind: str, index: type) -> None:
    held = RNG.standard_normal((2, 3, 16, 64)).astype(np.float32)
    where = np.stack([RNG.permutation(16)[:5] for _ in range(6)]).reshape(2, 3, 5).astype(index)
    with graph() as g:
        agrees(g, g.set_rows(g.tensor(held, kind), g.tensor(X), g.tensor(where)), EXACT)
        agrees(g, g.set_rows(g.tensor(held, kind), g.tensor(X), g.tensor(where[:1, :1])), EXACT)
        agrees(g, g.set_rows(g.tensor(held, kind), g.tensor(X, "F16"), g.tensor(where)), EXACT)


def test_single_values_written_to_a_transposed_cache() -> None:
    where = RNG.permutation(64 * 16)[:320].astype(np.int64)
    with graph() as g:
        cache = g.reshape_2d(g.tensor(np.zeros((64, 16), np.float32), "F16"), 1, 1024)
        agrees(g, g.set_rows(cache, g.reshape_2d(g.tensor(X[0, 0]), 1, 320), g.tensor(where)), EXACT)


# -- planted faults ------------------------------------------------------------------------------------


def test_a_row_written_to_the_wrong_place_is_seen() -> None:
    with graph() as g:
        recorded = g.run(
            g.set_rows(g.tensor(np.zeros((16, 64), np.float32)), g.tensor(X[0, 0]), g.tensor(i32(3, 1, 7, 2, 0)))
        )
        other = g.run(g.cont(g.tensor(i32(3, 1, 8, 2, 0)))).sources[0]
    assert distance(recorded) == 0
    assert distance(with_source(recorded, 1, other)) > 0.1


def test_rows_of_other_ids_are_seen() -> None:
    with graph() as g:
        recorded = g.run(g.get_rows(g.tensor(X[0, 0]), g.tensor(i32(3, 1, 4))))
        other = g.run(g.cont(g.tensor(i32(3, 1, 2)))).sources[0]
    assert distance(recorded) == 0
    assert distance(with_source(recorded, 1, other)) > 0.1


def test_wrong_parameters_are_seen() -> None:
    with graph() as g:
        joined = g.run(g.concat(g.tensor(X), g.tensor(X + 1), 2))
        laid = g.run(g.set(g.tensor(X), g.tensor(X[:1, :2, :3, :16].copy()), 256, 1280, 3840, 64))
        masked = g.run(g.diag_mask_zero(g.tensor(X), 2))
        moved = g.run(g.roll(g.tensor(X), 3, 0, 0, 0))
    wrong = {
        "the pieces exchanged": replace(joined, sources=joined.sources[::-1]),
        "laid elsewhere": replace(laid, params=params(256, 1280, 3840, 128)),
        "a mask off by one": replace(masked, params=params(3)),
        "moved by one more": replace(moved, params=params(4)),
    }
    assert max(map(distance, (joined, laid, masked, moved))) == 0
    found = {name: distance(each) for name, each in wrong.items()}
    assert min(found.values()) > 1e-3, found


def with_source(recorded: RecordedNode, slot: int, value: object) -> RecordedNode:
    return replace(recorded, sources=tuple(value if i == slot else s for i, s in enumerate(recorded.sources)))  # type: ignore[misc]


@pytest.mark.parametrize("ids", [(0, 9), (-1, 0)])
def test_rows_that_do_not_exist(ids: tuple[int, int]) -> None:
    with pytest.raises(EngineError, match="names rows"):
        replay(node("GET_ROWS", (2, 64), X[0, 0], i32(*ids)))
    with pytest.raises(EngineError, match="names rows"):
        replay(node("SET_ROWS", (5, 64), X[0, 0, :2], i32(*ids), X[0, 0]))


def test_a_piece_that_does_not_fit() -> None:
    recorded = node("SET", (5, 64), X[0, 0], X[0, 0], op_params=params(256, 1280, 1280, 4))
    with pytest.raises(EngineError, match="writes element"):
        KERNELS["SET"](Call(recorded, NoWeights()))
