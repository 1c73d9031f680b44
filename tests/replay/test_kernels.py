"""One table of all kernels."""

from __future__ import annotations

import pytest

from diffharness.replay.kernels import KERNELS, collect

# What the issue names, by ggml_op_desc, but for views, which replay/views.py checks, and hyper-connection ops.
NAMED = """
MUL_MAT MUL_MAT_ID MUL ADD ADD_ID SUB DIV SCALE CLAMP CONT CPY REPEAT CONCAT GET_ROWS SET_ROWS RMS_NORM NORM L2_NORM
GROUP_NORM ROPE ROPE_BACK SOFT_MAX FLASH_ATTN_EXT SWIGLU SWIGLU_OAI GEGLU GEGLU_ERF GEGLU_QUICK REGLU SILU GELU GELU_ERF
GELU_QUICK RELU SQR SQRT EXP TANH SIGMOID SOFTPLUS SGN ABS ARGSORT TOP_K SUM_ROWS ARANGE FILL SSM_CONV SSM_SCAN
GATED_DELTA_NET RWKV_WKV6 RWKV_WKV7 LIGHTNING_INDEXER
""".split()


@pytest.mark.parametrize("op", NAMED)
def test_there_is_a_kernel(op: str) -> None:
    assert op in KERNELS


def test_no_op_has_two() -> None:
    with pytest.raises(ValueError, match="ADD has kernels in a and in b"):
        collect({"a": {"ADD": lambda call: call.x(0)}, "b": {"ADD": lambda call: call.x(0)}})
