from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.replay.ggml_graph import graph
from tests.replay.oracle import agrees

RNG = np.random.default_rng(29)
LIMIT = 1e-12
NEAREST, BILINEAR, BICUBIC, ALIGN_CORNERS, ANTIALIAS = 0, 1, 2, 1 << 8, 1 << 9


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [(14, 22), (5, 3), (23, 31), (1, 1), (7, 40)])
@pytest.mark.parametrize(
    "mode",
    [
        *(NEAREST, BILINEAR, BICUBIC),
        *(BILINEAR | ALIGN_CORNERS, BICUBIC | ALIGN_CORNERS, NEAREST | ALIGN_CORNERS),
        *(BILINEAR | ANTIALIAS, BILINEAR | ANTIALIAS | ALIGN_CORNERS),
    ],
)
def test_resizing(mode: int, size: tuple[int, int]) -> None:
    with graph() as g:
        x = g.tensor(normal(2, 3, 7, 11))
        agrees(g, g.interpolate(x, size[1], size[0], 3, 2, mode), 1e-11)


def test_channels_are_resized_by_the_nearest() -> None:
    with graph() as g:
        agrees(g, g.interpolate(g.tensor(normal(2, 3, 7, 11)), 22, 14, 6, 4, BILINEAR), 1e-11)


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (13, 16), (3, 5)])
def test_windows_and_back(rows: int, columns: int) -> None:
    with graph() as g:
        parts = g.win_part(g.tensor(normal(rows, columns, 6)), 7)
        agrees(g, parts, 0.0)
        agrees(g, g.win_unpart(parts, columns, rows, 7), 0.0)


def test_relative_positions() -> None:
    with graph() as g:
        agrees(g, g.get_rel_pos(g.tensor(normal(2 * 9 - 1, 6), "F16"), 9, 9), 0.0)


@pytest.mark.parametrize("inplace", [False, True])
def test_adding_relative_positions(inplace: bool) -> None:
    n = 5
    add = "add_rel_pos_inplace" if inplace else "add_rel_pos"
    with graph() as g:
        scores, by_column, by_row = g.tensor(normal(2, n * n, n * n)), normal(2, n, n, n), normal(2, n, n, n)
        agrees(g, getattr(g, add)(scores, g.tensor(by_column), g.tensor(by_row)), LIMIT)


@pytest.mark.parametrize("dim", [32, 33])
def test_time_steps(dim: int) -> None:
    with graph() as g:
        steps = g.tensor(np.array([0, 1, 37, 999.5], dtype=np.float32))
        agrees(g, g.timestep_embedding(steps, dim, 10000), 1e-10)
