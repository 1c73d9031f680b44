"""`explain` against the real engine made wrong, one fault at a time: each is named, and named first.

The engine is made wrong by --override-kv, by a changed copy of the model that only it sees (keys, tensors, or the same
keys and tensors under another architecture's name, whose graph differs in one thing), or by other ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffharness.weights.gguf_file import GgufFile
from diffharness.weights.source import Float32Array
from tests.e2e.conftest import MakePair
from tests.e2e.explaining import Wrong, explain_wrong


def values(which: str, change: Callable[[Float32Array], Float32Array]) -> Callable[[str, Float32Array], Float32Array]:
    """Tensors whose name holds `which`, changed."""
    return lambda name, value: change(value) if which in name else value


def without(*which: str) -> Callable[[str], str | None]:
    """A file that lacks the tensors whose name holds one of `which`."""
    return lambda name: None if any(part in name for part in which) else name


def exchanged(a: str, b: str) -> Callable[[str], str]:
    """A file in which tensors of these two names stand in each other's place."""
    return lambda name: name.replace(a, "\0").replace(b, a).replace("\0", b)


def unscaled_embedding(source: GgufFile) -> dict[str, Float32Array]:
    """The head with rows of its own, so that those of the embedding can be changed."""
    return {"output.weight": source.read("token_embd.weight")}


def zero_biases(source: GgufFile) -> dict[str, Float32Array]:
    n_layer, width = source.metadata[f"{source.arch}.block_count"], source.tensors["output_norm.weight"].shape
    return {f"blk.{il}.attn_output.bias": np.zeros(width, np.float32) for il in range(n_layer)}


def late(token: int) -> Callable[[list[int]], list[int]]:
    return lambda ids: [token, *ids[:-1]]


def permuted_pairs(size_of: Callable[[int], int]) -> Callable[[str, Float32Array], Float32Array]:
    """As a converter for llama stores queries and keys: the halves of each head as pairs, heads of a size by layer."""

    def change(name: str, value: Float32Array) -> Float32Array:
        if "attn_q." not in name and "attn_k." not in name:
            return value
        size = size_of(int(name.split(".")[1]))
        return value.reshape(-1, 2, size // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)

    return change


PERMUTED = "the rows of attn_q and attn_k were permuted to interleaved pairs once too often"
SQUARE = {"granite.logit_scale": 1.0}
PANGU = Wrong(arch="pangu-embedded", names=without("q_norm", "k_norm"), more=zero_biases)

# case, what is wrong, what has to be said
FAULTS: list[tuple[str, Wrong, str]] = [
    # rope
    ("llama", Wrong(("llama.rope.freq_base=float:9000",)), "the rope base were 9000"),
    (
        "gemma3",
        Wrong(("gemma3.rope.freq_base=float:10000",)),
        "the rope base of global layers were 10000, that of sliding layers",
    ),
    (
        "gemma4",
        Wrong(("gemma4.rope.freq_base_swa=float:1000000",)),
        "the rope base of sliding layers were 1000000, that of global layers",
    ),
    ("llama-llama3", Wrong(names=without("rope_freqs")), "the rope frequency factors were absent"),
    (
        "llama-llama3",
        Wrong(values=values("rope_freqs", lambda x: 1 / x)),
        "rope frequencies were multiplied by their factors",
    ),
    (
        "gemma4",
        Wrong(values=values("rope_freqs", np.ones_like)),
        "the rope frequency factors were absent, so that every pair of a head turned",
    ),
    ("gemma3", Wrong(("gemma3.rope.scaling.factor=float:1",)), "linear rope scaling of global layers were dropped"),
    ("llama-linear", Wrong(("llama.rope.scaling.factor=float:9",)), "linear rope scaling were applied twice"),
    ("llama-yarn", Wrong(("llama.rope.scaling.type=str:none",)), "yarn rope scaling were dropped"),
    ("llama-square", Wrong(arch="qwen2"), "queries and keys were turned in half-split pairs (i, i + n/2)"),
    ("qwen2", Wrong(arch="llama"), "queries and keys were turned in interleaved pairs (2i, 2i + 1)"),
    # attention
    (
        "llama-square",
        Wrong(arch="granite", kv=SQUARE | {"granite.attention.scale": 1.0}),
        "attention scores were scaled by 1",
    ),
    (
        "llama-square",
        Wrong(arch="granite", kv=SQUARE | {"granite.attention.scale": 0.07}),
        "attention scores were scaled by 0.07",
    ),
    (
        "gemma2",
        Wrong(("gemma2.attn_logit_softcapping=float:4",)),
        "attn_logit_softcapping of all layers were 4, twice the model's",
    ),
    ("gemma2", Wrong(("gemma2.attn_logit_softcapping=float:2.9",)), "attn_logit_softcapping of all layers were 2.9"),
    ("gemma2", Wrong(("gemma2.attention.sliding_window=int:8",)), "the sliding window of sliding layers were 8"),
    (
        "gemma4",
        Wrong(("gemma4.attention.sliding_window=int:15",)),
        "the sliding window of sliding layers were 15, one less than the model's",
    ),
    (
        "gemma3",
        Wrong(("gemma3.attention.sliding_window=int:17",)),
        "the sliding window of sliding layers were 17, one more than the model's",
    ),
    (
        "gemma4",
        Wrong(("gemma4.attention.sliding_window=int:4096",)),
        "the sliding window of sliding layers were absent",
    ),
    (
        "gemma3",
        Wrong(kv={"gemma3.attention.sliding_window_pattern": 2}),
        "sliding layers were global ones, in rope and window",
    ),
    # norms
    ("gemma4", Wrong(values=values("norm", lambda x: x + 1)), "1 were added to the weights of norms"),
    ("qwen2", Wrong(values=values("norm", lambda x: x - 1)), "1 were taken from the weights of norms"),
    ("llama", Wrong(("llama.attention.layer_norm_rms_epsilon=float:0.0001",)), "the epsilon of norms were 0.0001"),
    ("qwen2", Wrong(("qwen2.attention.layer_norm_rms_epsilon=float:0.002",)), "the epsilon of norms were 0.002"),
    ("qwen3", PANGU, "queries and keys were not normalised"),
    ("qwen3", Wrong(arch="hunyuan-dense"), "queries and keys were normalised after they were turned"),
    # feed-forward and experts
    ("qwen3", Wrong(names=exchanged("ffn_gate", "ffn_up")), "the gate and up projections were exchanged"),
    ("mixtral", Wrong(("llama.expert_used_count=int:1",)), "1 experts were used for a token, and not 2"),
    (
        "qwen3moe",
        Wrong(values=values("ffn_gate_inp", lambda x: x[[1, 0, 3, 2, 5, 4]])),
        "the router's rows stood in another order than the experts (1, 0, 3, 2, 5, 4)",
    ),
    # scales and caps
    ("gemma4", Wrong(("gemma4.final_logit_softcapping=float:0",)), "final_logit_softcapping were absent"),
    ("gemma4", Wrong(("gemma4.final_logit_softcapping=float:7.3",)), "final_logit_softcapping were 7.3"),
    (
        "gemma3",
        Wrong(more=unscaled_embedding, values=values("token_embd", lambda x: x / 8)),
        "the embedding scale were absent",
    ),
    ("gemma4", Wrong(values=values("layer_output_scale", np.ones_like)), "the layer scalars were absent"),
    (
        "llama-square",
        Wrong(arch="granite", kv=SQUARE | {"granite.residual_scale": 0.5}),
        "branches were scaled by 0.5 before they were added to the residual",
    ),
    (
        "llama",
        Wrong(values=lambda name, value: value * 0.3 if name == "output.weight" else value),
        "logits were multiplied by 0.3",
    ),
    # tensors
    ("qwen2", Wrong(names=without(".bias")), "biases were left out"),
    (
        "llama",
        Wrong(names=lambda name: None if name == "output.weight" else name),
        "the head were tied to the embedding",
    ),
    ("qwen2", Wrong(values=permuted_pairs(lambda il: 16)), PERMUTED),
    ("gemma4", Wrong(values=permuted_pairs(lambda il: 64 if il % 3 == 2 else 32)), PERMUTED),
    # tokens
    ("qwen3moe", Wrong(ids=late(1)), "token 1 stood before the tokens, every token one place late"),
    ("gemma2", Wrong(ids=late(2)), "token 2 stood before the tokens, every token one place late"),
    (
        "llama",
        Wrong(ids=lambda ids: [*ids[1:], 5]),
        "the first token were left out, every other token one place early",
    ),
    ("llama", Wrong(ids=lambda ids: [2, *ids], drop_rows=1), "token 2 stood unseen before the tokens"),
    (
        "gemma4-e",
        Wrong(ids=lambda ids: [ids[0], *ids], drop_rows=1),
        "one more of the first token stood unseen before the tokens",
    ),
]


def test_there_are_enough_of_them() -> None:
    assert len({says for _, _, says in FAULTS}) >= 20
    assert len({case.split("-")[0] for case, _, _ in FAULTS}) >= 3


@pytest.mark.parametrize(("case", "wrong", "says"), FAULTS, ids=[f"{case}: {says}" for case, _, says in FAULTS])
def test_the_fault_is_named(make_pair: MakePair, tmp_path: Path, case: str, wrong: Wrong, says: str) -> None:
    told = explain_wrong(make_pair(case), wrong, tmp_path)
    assert told is not None and told.found, told
    first = told.hypotheses[0]
    assert says in [row.says for row in told.hypotheses if row is first or row.equal], told.answer
    assert says in told.answer and told.facts is None
    assert first.local_after < 1e-11 < 1e-7 < first.local_before
    assert first.logits_after is not None and first.logits_before is not None
    assert first.logits_after < 1e-5 and first.logits_after < first.logits_before


@pytest.mark.parametrize("case", ["llama", "gemma4", "qwen3moe"])
def test_nothing_is_named_of_a_clean_engine(make_pair: MakePair, tmp_path: Path, case: str) -> None:
    assert explain_wrong(make_pair(case), Wrong(), tmp_path) is None


@pytest.mark.parametrize(("case", "tensor"), [("llama", "blk.1.attn_k.weight"), ("gemma4", "blk.2.ffn_down.weight")])
def test_noise_fits_no_hypothesis(make_pair: MakePair, tmp_path: Path, case: str, tensor: str) -> None:
    noise = np.random.default_rng(0)

    def noisy(value: Float32Array) -> Float32Array:
        return value + np.float32(0.1) * noise.standard_normal(value.shape).astype(np.float32) * value.std()

    told = explain_wrong(make_pair(case), Wrong(values=values(tensor, noisy)), tmp_path)
    assert told is not None and not told.found
    assert told.answer.startswith("none of the") and not any(row.fits == "yes" for row in told.hypotheses)
    facts, layer = told.facts, tensor.split(".")[1]
    assert facts is not None and facts.tap.startswith(f"blk.{layer}.")
    name = facts.tap.split(".")[-1]
    assert facts.ratios[name] == pytest.approx(1, abs=0.1)
    assert facts.tokens == facts.tokens_of > 0 and 1 < facts.rank <= facts.rank_of
    assert facts.heads == list(range(2)) if name == "attn_k" else facts.n_heads is None
    assert any("singular values" in words for words in facts.words)
    assert f"llama.cpp makes {facts.tap} in " in told.answer and f"MUL_MAT of {tensor}" in told.answer
    assert f"the last tap before it that agrees is blk.{layer}." in told.answer


def test_two_faults_are_told_one_after_the_other(make_pair: MakePair, tmp_path: Path) -> None:
    wrong = Wrong(("gemma4.final_logit_softcapping=float:0", "gemma4.rope.freq_base=float:10000"))
    told = explain_wrong(make_pair("gemma4"), wrong, tmp_path)
    assert told is not None and told.found
    assert "the rope base of global layers were 10000" in told.hypotheses[0].says
    assert "final_logit_softcapping were absent" in told.hypotheses[0].says


def test_a_fault_of_some_layers_is_told_of_these(make_pair: MakePair, tmp_path: Path) -> None:
    wrong = Wrong(values=lambda name, value: value * 0 + 1 if name in SCALARS else value)
    told = explain_wrong(make_pair("gemma4"), wrong, tmp_path)
    assert told is not None and told.found
    first = told.hypotheses[0]
    assert first.says == "the layer scalars were absent" and first.places == "only sliding layers, of them 1, 4"


SCALARS = ("blk.1.layer_output_scale.weight", "blk.4.layer_output_scale.weight")
