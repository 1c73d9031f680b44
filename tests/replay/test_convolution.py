from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.replay.ggml_graph import graph
from tests.replay.oracle import agrees

RNG = np.random.default_rng(23)
LIMIT = 1e-12
F16, F32 = 1, 0  # enum ggml_type
STEPS = [(1, 0, 1), (2, 1, 1), (1, 2, 2), (3, 2, 2)]  # stride, padding, dilation


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("s", "p", "d"), STEPS)
@pytest.mark.parametrize("type_id", [F16, F32])
def test_im2col(s: int, p: int, d: int, type_id: int) -> None:
    with graph() as g:
        filters, x = g.tensor(normal(5, 3, 3, 4), "F16"), g.tensor(normal(2, 3, 11, 13))
        agrees(g, g.im2col(filters, x, s, s + 1, p, p + 1, d, d, True, type_id), 0.0)


@pytest.mark.parametrize(("s", "p", "d"), STEPS)
def test_im2col_in_one_dimension(s: int, p: int, d: int) -> None:
    with graph() as g:
        filters, x = g.tensor(normal(5, 3, 4)), g.tensor(normal(2, 3, 17))
        agrees(g, g.im2col(filters, x, s, 0, p, 0, d, 0, False, F32), 0.0)


@pytest.mark.parametrize(("s", "p", "d"), STEPS)
@pytest.mark.parametrize("type_id", [F16, F32])
def test_im2col_3d(s: int, p: int, d: int, type_id: int) -> None:
    with graph() as g:
        filters, x = g.tensor(normal(5 * 3, 2, 3, 4), "F16"), g.tensor(normal(2 * 3, 7, 9, 11))
        agrees(g, g.im2col_3d(filters, x, 3, s, s + 1, s + 2, p, p + 1, p, d, d, 1, type_id), 0.0)


@pytest.mark.parametrize(("s", "p"), [(1, 0), (2, 1), (4, 3), (6, 0)])
@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_col2im_1d(s: int, p: int, type_name: str) -> None:
    with graph() as g:
        agrees(g, g.col2im_1d(g.tensor(normal(9, 3 * 4), type_name), s, 3, p), LIMIT)


@pytest.mark.parametrize(("s", "p", "d"), STEPS)
@pytest.mark.parametrize("type_name", ["F32", "F16"])
def test_conv_2d(s: int, p: int, d: int, type_name: str) -> None:
    with graph() as g:
        filters, x = g.tensor(normal(5, 3, 3, 4), type_name), g.tensor(normal(2, 3, 11, 13))
        agrees(g, g.conv_2d_direct(filters, x, s, s + 1, p, p + 1, d, d), LIMIT)


@pytest.mark.parametrize(("s", "p", "d"), STEPS)
@pytest.mark.parametrize("type_name", ["F32", "F16"])
def test_conv_3d(s: int, p: int, d: int, type_name: str) -> None:
    with graph() as g:
        filters, x = g.tensor(normal(5 * 3, 2, 3, 4), type_name), g.tensor(normal(2 * 3, 7, 9, 11))
        agrees(g, g.conv_3d_direct(filters, x, s, s + 1, 1, p, p + 1, 1, d, d, 1, 3, 2, 5), LIMIT)


@pytest.mark.parametrize(("s", "p", "d"), STEPS)
@pytest.mark.parametrize("type_name", ["F32", "F16"])
@pytest.mark.parametrize("channels_first", [True, False])
def test_conv_2d_dw(s: int, p: int, d: int, type_name: str, channels_first: bool) -> None:
    """Also in the layout where the channels of a point lie together, which ggml computes by another routine."""
    n, n_channels = 2, 37
    with graph() as g:
        if channels_first:
            x = g.permute(g.tensor(normal(n, 11, 13, n_channels)), 2, 0, 1, 3)
            filters = g.permute(g.tensor(normal(3, 4, 1, n_channels), type_name), 3, 2, 0, 1)
        else:
            x, filters = g.tensor(normal(n, n_channels, 11, 13)), g.tensor(normal(n_channels, 1, 3, 4), type_name)
        agrees(g, g.conv_2d_dw_direct(filters, x, s, s + 1, p, p + 1, d, d), LIMIT)


@pytest.mark.parametrize("s", [1, 2, 5])
@pytest.mark.parametrize("type_name", ["F32", "F16"])
def test_conv_transpose(s: int, type_name: str) -> None:
    with graph() as g:
        filters, x = g.tensor(normal(6, 5, 4), type_name), g.tensor(normal(6, 9))
        agrees(g, g.conv_transpose_1d(filters, x, s, 0, 1), LIMIT)
    with graph() as g:
        filters, x = g.tensor(normal(6, 5, 3, 4), "F16"), g.tensor(normal(2, 6, 7, 9))
        agrees(g, g.conv_transpose_2d_p0(filters, x, s), LIMIT)


@pytest.mark.parametrize("op", [0, 1])
@pytest.mark.parametrize(("k", "s", "p"), [(3, 1, 0), (3, 2, 1), (4, 4, 2)])
@pytest.mark.parametrize("type_name", ["F32", "F16"])
def test_pooling(op: int, k: int, s: int, p: int, type_name: str) -> None:
    with graph() as g:
        x = g.tensor(normal(2, 3, 12, 20), type_name)
        agrees(g, g.pool_1d(x, op, k, s, p), LIMIT)
    with graph() as g:
        scores = normal(2, 3, 12, 20)
        scores[:, :, :6, :9] = -np.inf if op == 0 else 0  # masked ones fill whole windows
        agrees(g, g.pool_2d(g.tensor(scores, type_name), op, k, k + 1, s, s + 1, float(p), float(p)), LIMIT)
