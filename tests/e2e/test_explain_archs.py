"""`explain` on what only some architectures have, each told wrongly to the real engine alone: keys or tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from diffharness.pipeline import synthesizing
from tests.e2e.conftest import Pair
from tests.e2e.explaining import Values, Wrong, explain_wrong
from tests.e2e.runs import NATIVE
from tests.e2e.test_explain_planted import explain_planted
from tests.oracles.cases import CASES

N_TOKENS = 96


def zero(stem: str) -> Values:
    """The tensors of this name as zeros."""
    return lambda name, value: np.zeros_like(value) if name.endswith(f".{stem}") else value


def reversed_taps(name: str, value: np.ndarray) -> np.ndarray:
    return value[:, ::-1] if name.endswith("ssm_conv1d.weight") else value


def without_sinks(name: str, value: np.ndarray) -> np.ndarray:
    return np.full_like(value, -1e4) if "attn_sinks" in name else value


def without_norm_biases(name: str, value: np.ndarray) -> np.ndarray:
    return np.zeros_like(value) if name.endswith("norm.bias") else value


TOLD: list[tuple[str, Wrong, str]] = [
    ("gpt2", Wrong(("gpt2.attention.layer_norm_epsilon=float:0.05",)), "the epsilon of norms were 0.05"),
    ("gpt2", Wrong(values=without_norm_biases), "norms had no bias"),
    ("bloom", Wrong(("bloom.attention.layer_norm_epsilon=float:1e-5",)), "the epsilon of norms were 1e-05"),
    ("mamba2", Wrong(("mamba2.attention.layer_norm_rms_epsilon=float:0.02",)), "the epsilon of norms were 0.02"),
    ("mamba2", Wrong(values=reversed_taps), "the short convolution had its weights in reverse order"),
    ("mamba2", Wrong(values=zero("ssm_d")), "what a mixer passes by its state (ssm_d) were left out"),
    ("mamba", Wrong(("mamba.ssm.dt_b_c_rms=bool:true",)), "what time steps, b and c are made of were normalised"),
    ("mpt", Wrong(("mpt.attention.max_alibi_bias=float:4",)), "ALiBi's largest bias were 4, and not 8"),
    (
        "gptneox",
        Wrong(("gptneox.use_parallel_residual=bool:false",)),
        "the feed-forward read what attention had been added to, and not the layer's input",
    ),
    ("olmo", Wrong(("olmo.attention.clamp_kqv=float:0",)), "queries, keys and values were not clamped"),
    ("minicpm", Wrong(("minicpm.residual_scale=float:1",)), "the residual scale were absent"),
    ("command-r", Wrong(("command-r.logit_scale=float:1",)), "the scale of the logits were absent"),
    ("gpt-oss", Wrong(values=without_sinks), "attention sinks were absent"),
    ("gpt-oss", Wrong(("gpt-oss.attention.sliding_window=int:16",)), "the sliding window of sliding layers were 16"),
    ("gpt-oss", Wrong(("gpt-oss.rope.scaling.factor=float:2",)), "yarn's factor of all layers were 2"),
    ("phi3", Wrong(("phi3.rope.freq_base=float:50000",)), "the rope base were 50000"),
    (
        "phi3",
        Wrong(("phi3.rope.scaling.original_context_length=int:500",)),
        "LongRoPE's list for short texts were in use",
    ),
    ("deepseek2", Wrong(("deepseek2.expert_weights_scale=float:1",)), "the scale of experts' weights were absent"),
    ("deepseek2", Wrong(("deepseek2.expert_weights_norm=bool:false",)), "experts' weights were not normalised"),
    ("deepseek2", Wrong(("deepseek2.expert_gating_func=int:1",)), "the router's gate were a softmax, and no sigmoid"),
    ("deepseek2", Wrong(values=zero("exp_probs_b.bias")), "the bias on the choice of experts were left out"),
    ("deepseek2", Wrong(values=zero("ffn_down_shexp.weight")), "shared experts were left out"),
    (
        "deepseek2",
        Wrong(("deepseek2.rope.scaling.yarn_log_multiplier=float:0",)),
        "yarn's magnitude were 1 + 0.1 ln(factor)",
    ),
    (
        "qwen3next",
        Wrong(("qwen3next.attention.layer_norm_rms_epsilon=float:0.02",)),
        "the epsilon of all norms were 0.02, also of those with one of their own",
    ),
]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A tiny model by architecture; do not change it."""
    made: dict[str, Pair] = {}

    def make(arch: str) -> Pair:
        if arch not in made:
            request = synthesizing.SynthRequest(arch, tmp_path_factory.mktemp(arch), NATIVE, n_tokens=N_TOKENS)
            found = synthesizing.run(request)
            made[arch] = Pair(Path(found.gguf), Path(found.checkpoint), Path(found.fixture))
        return made[arch]

    return make


@pytest.mark.parametrize(("arch", "wrong", "says"), TOLD, ids=[f"{arch}: {says}" for arch, _, says in TOLD])
def test_it_is_told(arch: str, wrong: Wrong, says: str, synthetic: Callable[[str], Pair], tmp_path: Path) -> None:
    found = explain_wrong(synthetic(arch), wrong, tmp_path)
    assert found is not None and found.found, found
    best = found.hypotheses[0]
    assert best.says == says or any(row.equal and row.says == says for row in found.hypotheses), found.answer


def test_branches_side_by_side(tmp_path: Path) -> None:
    case = CASES["gptneox-sequential"]
    made = synthesizing.run(
        synthesizing.SynthRequest(case.arch, tmp_path / "synth", NATIVE, n_tokens=N_TOKENS, changes=case.changes)
    )
    pair = Pair(Path(made.gguf), Path(made.checkpoint), Path(made.fixture))
    found = explain_wrong(pair, Wrong(("gptneox.use_parallel_residual=bool:true",)), tmp_path)
    assert found is not None and found.found, found
    assert (
        found.hypotheses[0].says == "the feed-forward read the layer's input, and not what attention had been added to"
    )
    assert found.hypotheses[0].names == ["branches.abreast"] and found.hypotheses[0].places is None, found.answer


def normed_and_then_turned(
    me: Any, plain: Any, w: Any, il: int, name: str, x: Tensor, cos: Any, sin: Any, tap: Any
) -> Any:
    weight = w.get(f"blk.{il}.{name}_norm.weight")
    x = x / (x.square().mean(-1, keepdim=True) + me.eps).sqrt() * weight
    tap(f"{name}_rope_norm", x.flatten(-2))
    x = me.turn(il, name, x, cos, sin)
    tap(f"{name}_rope", x.flatten(-2))
    return x


def test_norms_on_the_wrong_side_of_the_rotation(synthetic: Callable[[str], Pair], tmp_path: Path) -> None:
    found = explain_planted(synthetic("hunyuan-dense"), {"prepare": normed_and_then_turned}, tmp_path)
    assert found is not None and found.found, found
    assert found.hypotheses[0].says == "queries and keys were normalised before they were turned", found.answer


def test_groups_of_experts_chosen_in_the_way_of_a_later_model(tmp_path: Path) -> None:
    """The engine needs no fault for it: what it does to DeepSeek V2's files."""
    case = CASES["deepseek2-v2-groups"]
    made = synthesizing.run(
        synthesizing.SynthRequest(case.arch, tmp_path / "synth", NATIVE, n_tokens=N_TOKENS, changes=case.changes)
    )
    pair = Pair(Path(made.gguf), Path(made.checkpoint), Path(made.fixture))
    found = explain_wrong(pair, Wrong(), tmp_path)
    assert found is not None and found.found, found
    assert found.hypotheses[0].says == "groups of experts were chosen by the sum of their two best experts", (
        found.answer
    )
