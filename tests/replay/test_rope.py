from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from diffharness.recorded import RecordedNode
from tests.replay.ggml_graph import Graph, graph
from tests.replay.oracle import agrees, distance

RNG = np.random.default_rng(5)
NORMAL, NEOX, MROPE, VISION, IMROPE = 0, 2, 8, 24, 40
SECTIONS = [8, 12, 10, 2]
POSITIONS = np.array([0, 1, 5, 63, 64, 100, 900], dtype=np.int32)
YARN = {"n_ctx_orig": 64, "freq_scale": 0.25, "ext_factor": 1.0, "magnitude": 1.1}
LINEAR = {"freq_scale": 0.125}


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def rope(
    g: Graph,
    mode: int,
    *,
    x: int | None = None,
    op: str = "ext",
    width: int = 64,
    n_dims: int | None = None,
    factors: bool = False,
    base: float = 10000.0,
    n_ctx_orig: int = 4096,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    magnitude: float = 1.0,
    sections: list[int] = SECTIONS,
    positions: NDArray[np.int32] = POSITIONS,
) -> int:
    x = g.tensor(normal(2, len(positions), 3, width)) if x is None else x
    n_dims = n_dims or (width // 2 if mode == VISION else width)
    divisors = g.tensor(np.abs(normal(width // 2)) + 0.5) if factors else None
    multi = bool(mode & MROPE)
    at = np.concatenate([positions, positions // 2, positions // 3, positions // 5]) if multi else positions
    four = (ctypes.c_int * 4)(*sections)  # kept until the op is made
    function = f"rope_{'multi' if multi else 'ext'}{op.removeprefix('ext')}"
    return getattr(g, function)(
        *(x, g.tensor(at), divisors, n_dims, *([ctypes.addressof(four)] if multi else []), mode, n_ctx_orig),
        *(base, freq_scale, ext_factor, magnitude, 32.0, 1.0),
    )


MODES = pytest.mark.parametrize("mode", [NORMAL, NEOX, MROPE, VISION, IMROPE])


@MODES
@pytest.mark.parametrize("op", ["ext", "ext_back", "ext_inplace"])
@pytest.mark.parametrize(
    "features",
    [{}, {"factors": True}, LINEAR, YARN, {**YARN, "factors": True}, {"base": 1e6, "width": 96}, {"magnitude": 0.7}],
    ids=str,
)
def test_rope(mode: int, op: str, features: dict[str, float]) -> None:
    with graph() as g:
        agrees(g, rope(g, mode, op=op, **features))


@pytest.mark.parametrize("mode", [NORMAL, NEOX])
def test_partial_rope_and_an_offset(mode: int) -> None:
    with graph() as g:
        agrees(g, rope(g, mode, n_dims=24))
        agrees(g, rope(g, mode, n_dims=40, **YARN))
        node = rope(g, mode, n_dims=24)
        g.amend("rope_set_offset", node, 16)
        agrees(g, node)


def test_halves_and_permuted_sources() -> None:
    with graph() as g:
        agrees(g, rope(g, NEOX, x=g.tensor(normal(2, 7, 3, 64), "F16")), 1e-7)
        heads_first = g.permute(g.tensor(normal(3, 7, 64)), 0, 2, 1, 3)
        agrees(g, rope(g, NORMAL, x=heads_first))
        agrees(g, rope(g, NEOX, x=g.view_3d(g.tensor(normal(7, 5, 64)), 64, 3, 7, 256, 1280, 512)))


@MODES
def test_far_positions(mode: int) -> None:
    far = np.array([4000, 31999, 131000], dtype=np.int32)
    with graph() as g:
        agrees(g, rope(g, mode, positions=far))


@pytest.mark.parametrize("sections", [[16, 16, 0, 0], [0, 20, 12, 0], [32, 0, 0, 0], [5, 5, 5, 1]], ids=str)
@pytest.mark.parametrize("mode", [MROPE, VISION, IMROPE])
def test_sections(mode: int, sections: list[int]) -> None:
    with graph() as g:
        agrees(g, rope(g, mode, sections=sections))


def changed(node: RecordedNode, place: int, value: int | float) -> RecordedNode:
    params = node.params.copy()
    params[place] = np.float32(value).view(np.int32) if isinstance(value, float) else value
    return replace(node, params=params)


def test_a_wrong_parameter_is_seen() -> None:
    with graph() as g:
        node = g.run(rope(g, NEOX, n_dims=48, factors=True, **YARN))
        multi = g.run(rope(g, MROPE))
    wrong = {
        "the other pairing": changed(node, 2, NORMAL),
        "another base": changed(node, 5, 10100.0),
        "no scaling": changed(node, 6, 1.0),
        "no yarn": changed(node, 7, 0.0),
        "another magnitude": changed(node, 8, 1.0),
        "another original context": changed(node, 4, 128),
        "all of the head": changed(node, 1, 64),
        "turned back": replace(node, op="ROPE_BACK"),
        "no frequency factors": replace(node, sources=node.sources[:2]),
        "interleaved sections": changed(multi, 2, IMROPE),
        "other sections": changed(multi, 11, 9),
    }
    assert distance(node) <= 1e-10 and distance(multi) <= 1e-10
    found = {name: distance(each) for name, each in wrong.items()}
    assert min(found.values()) > 1e-6, found


def test_a_position_off_by_one_is_seen() -> None:
    with graph() as g:
        node = g.run(rope(g, NEOX))
        shifted = g.run(rope(g, NEOX, positions=POSITIONS + 1))
    assert distance(replace(node, sources=(node.sources[0], shifted.sources[1]))) > 1e-2
