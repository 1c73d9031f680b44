"""The table of taps: names alone, then the graphs of every architecture, whose values must add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffharness import taps
from diffharness.engine import nodes
from diffharness.engine.runner import Engine
from diffharness.settings import EngineSettings
from diffharness.weights.gguf_write import write_gguf

from .conftest import GEMMA, N_LAYER, tiny

ATTENTION = {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_rope", "attn_k_rope", "attn_ctx", "attn_out"}
DENSE = {"ffn_in", "ffn_norm", "ffn_gate", "ffn_up", "ffn_act", "ffn_out", "layer_out"}
SPARSE = {"ffn_in", "ffn_norm", "moe_logits", "moe_experts", "ffn_out", "layer_out"}
NORMS = {"attn_q_norm", "attn_k_norm"}
SANDWICH = {"attn_post_norm", "ffn_post_norm"}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA4 = {**GEMMA, "global_head_dim": 32, "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0}

CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("llama", {}, ATTENTION | DENSE),
    "llama with experts": ("llama", {**EXPERTS, "model_type": "mixtral"}, ATTENTION | SPARSE),
    "qwen2": ("qwen2", {}, ATTENTION | DENSE),
    "qwen3": ("qwen3", {}, ATTENTION | NORMS | DENSE),
    "qwen3moe": ("qwen3moe", {**EXPERTS, "norm_topk_prob": True}, ATTENTION | NORMS | SPARSE),
    "gemma2": ("gemma2", GEMMA, ATTENTION | DENSE | SANDWICH),
    "gemma3": ("gemma3", GEMMA, ATTENTION | NORMS | DENSE | SANDWICH),
    "gemma4": (
        "gemma4",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        ATTENTION | NORMS | DENSE | SANDWICH | {"attn_v_norm"},
    ),
    "gemma4 with experts": (
        "gemma4",
        {**GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        ATTENTION | NORMS | DENSE | SANDWICH | {"attn_v_norm", "moe_logits", "moe_experts"},
    ),
}


@pytest.mark.parametrize(
    ("arch", "name", "op", "sources", "expected"),
    [
        ("llama", "Qcur-3", "MUL_MAT", ("blk.3.attn_q.weight", "attn_norm-3"), ["blk.3.attn_q"]),
        ("qwen2", "Qcur-3", "ADD", ("Qcur-3", "blk.3.attn_q.bias"), ["blk.3.attn_q"]),
        ("llama", "Qcur-3", "RESHAPE", ("Qcur-3",), []),
        ("llama", "Qcur-3", "ROPE", ("Qcur-3", "inp_pos"), ["blk.3.attn_q_rope"]),
        ("gemma4", "Qcur_pos-12", "ROPE", ("Qcur_normed-12", "inp_pos"), ["blk.12.attn_q_rope"]),
        ("gemma3", "node_34", "MUL_MAT", ("blk.0.attn_output.weight", "kqv_out-0"), ["blk.0.attn_out"]),
        ("llama", "ffn_out-0", "MUL_MAT", ("blk.0.ffn_down.weight", "ffn_swiglu-0"), ["blk.0.ffn_out"]),
        ("llama", "ffn_out-0", "ADD", ("ffn_out-0", "ffn_inp-0"), []),
        ("llama", "attn_out-1", "ADD", ("a", "b"), []),
        ("gemma4", "attn_out-1", "ADD", ("a", "b"), ["blk.1.ffn_in"]),
        ("llama", "ffn_moe_out-1", "ADD", ("a", "b"), ["blk.1.moe_experts", "blk.1.ffn_out"]),
        ("gemma4", "ffn_moe_out-1", "ADD", ("a", "b"), ["blk.1.moe_experts"]),
        ("gemma4", "x", "MUL", ("norm", "blk.1.ffn_gate_inp.scale"), []),
        ("gemma4", "Vcur-5", "MUL_MAT", ("blk.5.attn_k.weight", "x"), ["blk.5.attn_k", "blk.5.attn_v"]),
        ("gemma4", "Vcur-4", "MUL_MAT", ("blk.4.attn_v.weight", "x"), ["blk.4.attn_v"]),
        ("gemma2", "ffn_post_norm", "MUL", ("norm", "blk.7.post_ffw_norm.weight"), ["blk.7.ffn_post_norm"]),
        ("llama", "result_norm", "MUL", ("norm", "output_norm.weight"), ["output_norm"]),
        ("llama", "embd", "GET_ROWS", ("token_embd.weight", "inp_tokens"), ["token_embd"]),
        ("gemma3", "inp_scaled", "SCALE", ("embd",), ["token_embd"]),
        ("llama", "result_output", "MUL_MAT", ("token_embd.weight", "result_norm"), []),
        ("some-new-arch", "q", "MUL_MAT", ("blk.0.attn_q.weight", "x"), ["blk.0.attn_q"]),
    ],
)
def test_match(arch: str, name: str, op: str, sources: tuple[str, ...], expected: list[str]) -> None:
    assert nodes.table_for(arch).match(name, op, sources) == expected


def test_holders() -> None:
    """Which nodes to look at, for a file that has these tensors."""
    has = {"blk.3.attn_q.weight", "blk.3.attn_q.bias", "output_norm.weight"}.__contains__
    llama, gemma = nodes.table_for("llama"), nodes.table_for("gemma3")
    assert llama.holders("blk.3.attn_q", has) == ["MUL_MAT of blk.3.attn_q.weight", "ADD of blk.3.attn_q.bias"]
    assert llama.holders("blk.3.attn_q_rope", has) == ["ROPE Qcur-3"]
    assert llama.holders("blk.3.layer_out", has) == ["l_out-3"]
    assert llama.holders("output_norm", has) == ["MUL of output_norm.weight"]
    assert gemma.holders("token_embd", has) == ["SCALE inp_scaled"]
    assert llama.holders("logits", has) == [] == llama.holders("blk.2.attn_q", has)


def test_every_tap_of_the_table_is_a_known_tap() -> None:
    known = {*taps.BEFORE_LAYERS, *taps.LAYER_TAPS, *taps.AFTER_LAYERS}
    for table in (nodes.BY_WEIGHT, *nodes.BY_NAME.values()):
        assert {tap for group in table.values() for tap in group} <= known


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [(None, True), ([], False), (["blk.*.attn_q"], True), (["blk.1.*"], False), (["attn_q"], False)],
)
def test_is_wanted(patterns: list[str] | None, wanted: bool) -> None:
    assert nodes.is_wanted("blk.0.attn_q", patterns) is wanted


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * weight


@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize("case", CASES)
def test_graphs_add_up(case: str, flash_attn: str, ids: list[int], tmp_path: Path) -> None:
    """Every tap is found in every layer, and taps follow from one another by the weights between them."""
    arch, config, expected = CASES[case]
    source = tiny(arch, **config)
    write_gguf(tmp_path / "m.gguf", source, type_of=lambda info: "F32")
    settings = EngineSettings(threads=1, flash_attn=flash_attn, n_ubatch=16, time_limit_s=120)
    capture = Engine(settings).capture(tmp_path / "m.gguf", [ids], tmp_path / "c").open()

    layers = {f"blk.{il}.{tap}" for il in range(N_LAYER) for tap in expected}
    assert set(capture.taps) == layers | {"token_embd", "output_norm", "logits"}

    def close(tap: str, value: np.ndarray) -> None:
        np.testing.assert_allclose(capture.read(tap), value, rtol=1e-4, atol=1e-4, err_msg=tap)

    scale = 64**0.5 if arch.startswith("gemma") else 1.0
    x = source.arrays["token_embd.weight"][ids] * scale
    close("token_embd", x)
    for il in range(N_LAYER):
        blk = f"blk.{il}."

        def tap(name: str, blk: str = blk) -> np.ndarray:
            return capture.read(blk + name)

        def weight(name: str, blk: str = blk) -> np.ndarray:
            return source.arrays[blk + name]

        close(blk + "attn_norm", rms_norm(x, weight("attn_norm.weight")))
        for name in ("attn_q", "attn_k"):
            bias = source.arrays.get(f"{blk}{name}.bias", np.float32(0))
            close(blk + name, tap("attn_norm") @ weight(f"{name}.weight").T + bias)
        value = "attn_v" if f"{blk}attn_v.weight" in source.arrays else "attn_k"
        bias = source.arrays.get(f"{blk}attn_v.bias", np.float32(0))
        close(blk + "attn_v", tap("attn_norm") @ weight(f"{value}.weight").T + bias)
        close(blk + "attn_out", tap("attn_ctx") @ weight("attn_output.weight").T)
        attended = tap("attn_post_norm") if "attn_post_norm" in expected else tap("attn_out")
        close(blk + "ffn_in", x + attended)
        close(blk + "ffn_norm", rms_norm(tap("ffn_in"), weight("ffn_norm.weight")))
        if "ffn_gate" in expected:
            close(blk + "ffn_gate", tap("ffn_norm") @ weight("ffn_gate.weight").T)
            close(blk + "ffn_up", tap("ffn_norm") @ weight("ffn_up.weight").T)
        if expected >= DENSE and "moe_experts" not in expected:
            close(blk + "ffn_out", tap("ffn_act") @ weight("ffn_down.weight").T)
        if expected >= SPARSE and not expected >= DENSE:
            close(blk + "moe_logits", tap("ffn_norm") @ weight("ffn_gate_inp.weight").T)
            close(blk + "ffn_out", tap("moe_experts"))
        fed = tap("ffn_post_norm") if "ffn_post_norm" in expected else tap("ffn_out")
        out_scale = source.arrays.get(blk + "layer_output_scale.weight", np.float32(1))
        close(blk + "layer_out", (tap("ffn_in") + fed) * out_scale)
        x = tap("layer_out")
    close("output_norm", rms_norm(x, source.arrays["output_norm.weight"]))
    logits = capture.read("output_norm") @ source.arrays["token_embd.weight"].T
    cap = source.metadata.get(f"{arch}.final_logit_softcapping")
    close("logits", np.tanh(logits / cap) * cap if cap else logits)
