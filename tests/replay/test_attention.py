from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffharness.recorded import RecordedNode
from diffharness.replay import attention
from diffharness.replay.attention import slopes
from tests.replay.ggml_graph import Graph, graph
from tests.replay.nodes import params, replay
from tests.replay.oracle import agrees, distance

RNG = np.random.default_rng(11)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def causal(n_queries: int, n_keys: int, window: int | None = None) -> NDArray[np.float32]:
    """The mask [queries, keys] of the last n_queries of as many tokens as there are keys; the last key is padding."""
    at, key = np.arange(n_keys - 1 - n_queries, n_keys - 1)[:, None], np.arange(n_keys)[None]
    seen = (key <= at) & (True if window is None else at - key < window)
    return np.where(seen, 0.0, -np.inf).astype(np.float32)


# -- softmax -------------------------------------------------------------------------------------------


def soft_max(g: Graph, mask_type: str | None, max_bias: float, sinks: bool, n_heads: int = 6) -> int:
    mask = None if mask_type is None else g.tensor(causal(9, 20, 7), mask_type)
    node = g.soft_max_ext(g.tensor(normal(2, n_heads, 9, 20) * 3), mask, 0.4, max_bias)
    if sinks:
        g.amend("soft_max_add_sinks", node, g.tensor(normal(n_heads)))
    return node


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("mask_type", "max_bias"), [(None, 0.0), ("F32", 0.0), ("F16", 0.0), ("F16", 8.0), ("F32", 4.0)]
)
def test_softmax(mask_type: str | None, max_bias: float, sinks: bool) -> None:
    with graph() as g:
        agrees(g, soft_max(g, mask_type, max_bias, sinks))


def test_softmax_masks_of_several_sequences_and_padded_rows() -> None:
    mask = np.stack([causal(9, 20), causal(9, 20, 3)])[:, None]
    padded = np.concatenate([mask, np.full((2, 1, 7, 20), -np.inf, np.float32)], axis=2)
    with graph() as g:
        agrees(g, g.soft_max_ext(g.tensor(normal(4, 3, 9, 20)), g.tensor(padded, "F16"), 1.0, 0.0))
        agrees(g, g.soft_max(g.tensor(normal(9, 20))))
        agrees(g, g.soft_max_inplace(g.tensor(normal(9, 20))))


def test_a_row_that_sees_nothing_is_not_a_number_on_both_sides() -> None:
    mask = causal(9, 20)
    mask[3] = -np.inf
    with graph() as g:
        node = agrees(g, g.soft_max_ext(g.tensor(normal(2, 9, 20)), g.tensor(mask), 1.0, 0.0))
    assert np.isnan(node.out.array()[0, :, 3]).all()


def test_alibi_slopes_of_head_counts_that_are_no_power_of_two() -> None:
    assert slopes(8, 8.0).tolist() == [2.0**-i for i in range(1, 9)]
    assert slopes(12, 8.0).tolist()[8:10] == pytest.approx([2**-0.5, 2**-1.5])


# -- flash attention -----------------------------------------------------------------------------------


def flash(
    g: Graph,
    kv: str | tuple[str, str] = "F16",
    n_queries: int = 5,
    n_keys: int = 40,
    *,
    heads: tuple[int, int] = (6, 2),
    width: tuple[int, int] = (64, 64),
    max_bias: float = 0.0,
    cap: float = 0.0,
    mask: NDArray[np.float32] | str | None = "causal",
    sinks: bool = False,
    batch: int = 1,
) -> int:
    k_type, v_type = (kv, kv) if isinstance(kv, str) else kv
    seen = causal(n_queries, n_keys) if isinstance(mask, str) else mask
    node = g.flash_attn_ext(
        g.tensor(normal(batch, heads[0], n_queries, width[0])),
        g.tensor(normal(batch, heads[1], n_keys, width[0]), k_type),
        g.tensor(normal(batch, heads[1], n_keys, width[1]) + 0.5, v_type),
        None if seen is None else g.tensor(seen, "F16"),
        0.125,
        max_bias,
        cap,
    )
    if sinks:
        g.amend("flash_attn_ext_add_sinks", node, g.tensor(normal(heads[0])))
    return node


# NMSE that an accumulator in float16 leaves where a score's last bit decides on a rounding.
HALVES = 1e-7


@pytest.mark.parametrize("n_queries", [1, 5, 63, 64, 70])
@pytest.mark.parametrize("kv", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"])
def test_flash_attention_by_the_types_of_keys_and_values(kv: str, n_queries: int) -> None:
    with graph() as g:
        agrees(g, flash(g, kv, n_queries, 100), HALVES if kv == "F16" and n_queries < 64 else 1e-10)


@pytest.mark.parametrize("n_queries", [3, 80])
@pytest.mark.parametrize(
    "features",
    [
        {"cap": 20.0},
        {"max_bias": 8.0},
        {"sinks": True},
        {"mask": None},
        {"mask": None, "sinks": True},
        {"width": (96, 32)},
        {"heads": (4, 4)},
        {"heads": (5, 1), "max_bias": 4.0, "cap": 5.0, "sinks": True},
        {"batch": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kv", ["F32", "F16", ("F16", "F32"), ("Q8_0", "F16")], ids=str)
def test_flash_attention_features(kv: Any, features: dict[str, Any], n_queries: int) -> None:
    with graph() as g:
        agrees(g, flash(g, kv, n_queries, 90, **features), 1e-10 if kv == "F32" else HALVES)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("kv", ["F32", "F16"])
def test_a_single_query_of_many_keys_is_divided_among_the_threads(kv: str, n_threads: int) -> None:
    with graph() as g:
        node = g.run(flash(g, kv, 1, 601, sinks=True), n_threads)
    assert distance(replace(node, n_threads=n_threads)) <= (1e-10 if kv == "F32" else HALVES)
    if kv == "F16":
        assert distance(replace(node, n_threads=n_threads + 1)) > 1e-6


def test_queries_that_see_nothing_are_zero() -> None:
    mask = causal(70, 100)
    mask[[0, 3]] = -np.inf
    for kv in ("F32", "F16"):
        for n_queries in (5, 70):
            with graph() as g:
                node = agrees(g, flash(g, kv, n_queries, 100, mask=mask[:n_queries]), HALVES)
            assert not node.out.array()[0, [0, 3]].any()


def test_permuted_queries_and_cache_views() -> None:
    with graph() as g:
        q = g.permute(g.tensor(normal(7, 6, 64)), 0, 2, 1, 3)
        k = g.permute(g.view_3d(g.tensor(normal(64, 2, 64), "F16"), 64, 2, 40, 128, 256, 0), 0, 2, 1, 3)
        v = g.permute(g.view_3d(g.tensor(normal(64, 2, 64), "F16"), 64, 2, 40, 128, 256, 512), 0, 2, 1, 3)
        agrees(g, g.flash_attn_ext(q, k, v, g.tensor(causal(7, 40), "F16"), 0.1, 0.0, 0.0), HALVES)


@pytest.mark.parametrize("n_queries", [5, 70])
def test_heads_in_pieces_give_the_same(n_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = np.stack([causal(n_queries, 90, window) for window in (None, 9, 30)])
    with graph() as g:
        node = agrees(g, flash(g, "F16", n_queries, 90, mask=masks, max_bias=8.0, sinks=True, batch=2), HALVES)
    whole = replay(node)
    monkeypatch.setattr(attention, "_ROOM", 1)
    assert np.array_equal(replay(node), whole)


def test_a_value_that_is_not_a_number_is_one_on_both_sides() -> None:
    with graph() as g:
        v = normal(2, 40, 64)
        v[0, 7, 3] = np.nan
        q, k, mask = normal(6, 5, 64), normal(2, 40, 64), causal(5, 40)
        agrees(g, g.flash_attn_ext(g.tensor(q), g.tensor(k), g.tensor(v), g.tensor(mask, "F16"), 0.1, 0.0, 0.0))


# -- planted faults ------------------------------------------------------------------------------------


def without(node: RecordedNode, slot: int) -> RecordedNode:
    return replace(node, sources=tuple(None if i == slot else s for i, s in enumerate(node.sources)))


@pytest.mark.parametrize("n_queries", [3, 80])
def test_wrong_attention_is_seen(n_queries: int) -> None:
    with graph() as g:
        node = g.run(flash(g, "F16", n_queries, 90, cap=20.0, sinks=True, heads=(6, 2)))
        windowed = g.tensor(causal(n_queries, 90, 40), "F16")
        mask = g.run(g.cont(windowed)).sources[0]
    wrong = {
        "another scale": replace(node, params=params(0.125 * 1.01, 0.0, 20.0)),
        "no softcap": replace(node, params=params(0.125, 0.0, 0.0)),
        "another softcap": replace(node, params=params(0.125, 0.0, 30.0)),
        "ALiBi": replace(node, params=params(0.125, 8.0, 20.0)),
        "no sinks": without(node, 4),
        "no mask": without(node, 3),
        "a window": replace(node, sources=(*node.sources[:3], mask, node.sources[4])),
    }
    assert distance(node) <= HALVES
    found = {name: distance(each) for name, each in wrong.items()}
    del found["ALiBi"]  # a mask of zeros and infinities has nothing to be scaled
    assert min(found.values()) > 1e-6, found


def test_wrong_softmax_is_seen() -> None:
    with graph() as g:
        node = g.run(soft_max(g, "F32", 0.0, sinks=True))
        shifted = g.run(g.cont(g.tensor(causal(9, 20, 8)))).sources[0]
    wrong = {
        "another scale": replace(node, params=params(0.401, 0.0)),
        "no sinks": without(node, 2),
        "no mask": without(node, 1),
        "a window wider by one": replace(node, sources=(node.sources[0], shifted, node.sources[2])),
    }
    assert distance(node) <= 1e-10
    found = {name: distance(each) for name, each in wrong.items()}
    assert min(found.values()) > 1e-7, found
