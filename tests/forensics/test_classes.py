from __future__ import annotations

import math

import pytest

from diffharness.forensics import classes
from diffharness.records.inspect import Measures, TensorMeasures

NAMES = {
    "token_embd.weight": "embedding",
    "per_layer_token_embd.weight": "embedding",
    "output.weight": "output",
    "output_norm.weight": "norms",
    "blk.3.attn_q.weight": "attn_q",
    "blk.3.attn_q.bias": "attn_q",
    "blk.3.attn_q_norm.weight": "norms",
    "blk.3.attn_output.weight": "attn_output",
    "blk.3.post_ffw_norm_1.weight": "norms",
    "blk.3.ffn_gate.weight": "ffn_gate",
    "blk.3.ffn_gate_inp.weight": "router",
    "blk.3.ffn_gate_inp.scale": "router",
    "blk.3.ffn_gate_up_exps.weight": "experts",
    "blk.3.ffn_down_exps.scale": "scalars",
    "blk.3.layer_output_scale.weight": "scalars",
    "blk.3.exp_probs_b.bias": "router",
    "blk.3.attn_sinks.weight": "scalars",
    "blk.3.attn_q_b.weight": "attn_q",
    "blk.3.attn_q_a_norm.weight": "norms",
    "blk.3.attn_kv_a_mqa.weight": "attn_kv",
    "blk.3.attn_v_b.weight": "attn_v",
    "blk.3.attn_gate.weight": "attn_gate",
    "blk.3.ssm_in.weight": "ssm_in",
    "blk.3.shortconv.out_proj.weight": "ssm_out",
    "blk.3.shortconv.conv.weight": "ssm",
    "blk.3.ssm_conv1d_q.weight": "ssm",
    "blk.3.ssm_a": "ssm",
    "blk.3.ssm_dt_norm.weight": "norms",
    "position_embd.weight": "embedding",
    "token_embd_norm.weight": "norms",
    "blk.3.inp_gate.weight": "other",
    "rope_freqs.weight": "other",
}


@pytest.mark.parametrize(("name", "klass"), NAMES.items())
def test_classes_by_name(name: str, klass: str) -> None:
    assert classes.class_of(name) == klass
    assert klass in classes.CLASSES


def numbers(error: float) -> Measures:
    return Measures(
        cos=1 - error, cos_row_min=0, cos_row_p1=0, cos_row_p50=0, error=error, sqnr=0, scale=1, max_abs=0,
        kl_drift=0, outlier_kept=1, channel_kept=1,
    )  # fmt: skip


def tensor(name: str, n: int = 100, error: float = 0.1, ratio: float | None = 1.0, **more) -> TensorMeasures:
    layer = int(name.split(".")[1]) if name.startswith("blk.") else None
    told = {"artifact": numbers(error), "control": numbers(0.1), "ratio": ratio, "bpw": 4.5} | more
    return TensorMeasures(name=name, type="Q4_K", shape=[n], layer=layer, klass=classes.class_of(name), **told)


ROWS = [
    tensor("token_embd.weight", n=800, bpw=8.5),
    *(tensor(f"blk.{il}.attn_q.weight", drifted=il == 1, ratio=9.0 if il == 1 else 1.0) for il in range(3)),
    tensor("blk.0.attn_norm.weight", n=10, ratio=None),
    tensor("blk.2.ffn_up.weight", error=0.4, ratio=4.0, drifted=True),
]


def test_totals_count_attention_apart() -> None:
    got = classes.totals(ROWS)
    assert (got.tensors, got.compared, got.drifted, got.drifted_attention) == (6, 6, 2, 1)
    assert got.bits_per_weight == pytest.approx((800 * 8.5 + 410 * 4.5) / 1210)


def test_groups_pool_and_name_the_worst() -> None:
    by_class = {row.group: row for row in classes.by_class(ROWS)}
    assert list(by_class) == ["embedding", "attn_q", "ffn_up", "norms"]
    assert (by_class["attn_q"].n, by_class["attn_q"].drifted, by_class["attn_q"].n_params) == (3, 1, 300)
    assert by_class["attn_q"].worst == "blk.1.attn_q.weight"
    assert by_class["norms"].worst is None
    layer = classes.by_layer(ROWS)[2]
    assert layer.group == "2" and layer.error == pytest.approx(math.sqrt((0.1**2 + 0.4**2) / 2))


def test_grid_has_a_cell_for_every_layer_and_class() -> None:
    got = classes.grid(ROWS)
    assert (got.layers, got.classes) == ([0, 1, 2], ["attn_q", "ffn_up", "norms"])
    assert got.ratios == [[1.0, None, None], [9.0, None, None], [1.0, 4.0, None]]
    assert got.drifted == [[False, False, False], [True, False, False], [False, True, False]]


def test_a_ratio_that_is_no_number_is_the_worst() -> None:
    rows = [tensor("blk.0.attn_q.weight", ratio=math.nan), tensor("blk.0.attn_q.bias", ratio=3.0)]
    assert classes.grid(rows).ratios == [[math.inf]]


def test_nothing_adds_up_to_nothing() -> None:
    assert classes.totals([]).bits_per_weight is None
    assert (classes.by_class([]), classes.by_layer([]), classes.grid([]).layers) == ([], [], [])
