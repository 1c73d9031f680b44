"""`explain` on what the engine does with optional tensors of its own accord: no fault is planted.

llama.cpp reads a factor beside any matrix (`<matrix>.scale`), and then multiplies by it after the bias, or not at all;
it does not add every bias that it reads. The files here have such tensors; the engine is the real one on the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from diffharness.engine.strict import write_strict
from diffharness.pipeline import synthesizing
from diffharness.records.explain import Explanation
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.source import Float32Array
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.explaining import Changed, Wrong, explain_wrong
from tests.e2e.runs import NATIVE
from tests.e2e.test_explain_planted import explain_planted

Tensors = Callable[[GgufFile], Mapping[str, Float32Array]]

FFN = ("ffn_gate", "ffn_up", "ffn_down")
AFTER_BIAS = (
    "the factors beside matrices (.scale) of the feed-forward's matrices multiplied what biases had been added to, "
    "and not the product alone"
)
LEFT_OUT = "the factors beside matrices (.scale) of the feed-forward's matrices were left out"
OUTPUT_BIAS = "output.bias were left out"


def beside(stems: Iterable[str], *kinds: str) -> Tensors:
    """A random scale (one number) or bias beside each of these matrices of every layer."""

    def more(source: GgufFile) -> dict[str, Float32Array]:
        random = np.random.default_rng(3)
        found: dict[str, Float32Array] = {}
        for stem in stems:
            for il in range(source.metadata[f"{source.arch}.block_count"]):
                rows = source.tensors[f"blk.{il}.{stem}.weight"].shape[0]
                values = {"scale": random.uniform(0.5, 2.0, 1), "bias": random.normal(size=rows) / 4}
                found |= {f"blk.{il}.{stem}.{kind}": values[kind].astype(np.float32) for kind in kinds}
        return found

    return more


def output_bias(source: GgufFile) -> dict[str, Float32Array]:
    n_vocab = source.tensors["token_embd.weight"].shape[0]
    return {"output.bias": np.random.default_rng(4).normal(size=n_vocab).astype(np.float32)}


def extended(pair: Pair, *more: Tensors, folder: Path) -> Pair:
    """The pair's model with these tensors more."""
    path = folder / "extended.gguf"
    with open_gguf(pair.gguf) as source:
        tensors = {name: value for each in more for name, value in each(source).items()}
        write_strict(Changed(source, Wrong(more=lambda _: tensors)), source, path)
    return Pair(path, pair.checkpoint, pair.fixture)


def told_of(pair: Pair, *more: Tensors, folder: Path, wrong: Wrong | None = None) -> Explanation | None:
    """What `explain` says of the engine on the pair's model with these tensors more."""
    return explain_wrong(extended(pair, *more, folder=folder), wrong or Wrong(), folder)


@pytest.fixture(scope="module")
def qwen2vl(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    request = synthesizing.SynthRequest("qwen2vl", tmp_path_factory.mktemp("qwen2vl"), NATIVE, n_tokens=64)
    made = synthesizing.run(request)
    return Pair(Path(made.gguf), Path(made.checkpoint), Path(made.fixture))


def test_factors_after_biases(make_pair: MakePair, tmp_path: Path) -> None:
    told = told_of(make_pair("llama"), beside(FFN, "scale", "bias"), folder=tmp_path)
    assert told is not None and told.found, told
    assert told.hypotheses[0].says == AFTER_BIAS and not any(row.equal for row in told.hypotheses), told.answer
    assert told.hypotheses[0].local_after < 1e-11 < 1e-4 < told.hypotheses[0].local_before


def test_the_factor_of_one_matrix_after_its_bias(make_pair: MakePair, tmp_path: Path) -> None:
    """Of the three only the gate's bias is there to tell the orders apart."""
    tensors = (beside(FFN, "scale"), beside(["ffn_gate"], "bias"))
    told = told_of(make_pair("llama"), *tensors, folder=tmp_path)
    assert told is not None and told.found, told
    assert [row.says for row in told.hypotheses] == [AFTER_BIAS], told.answer


@pytest.mark.parametrize("kind", ["scale", "bias"])
def test_factors_or_biases_alone_are_no_difference(make_pair: MakePair, tmp_path: Path, kind: str) -> None:
    assert told_of(make_pair("llama"), beside(FFN, kind), folder=tmp_path) is None


def test_factors_of_attention_come_before_biases(make_pair: MakePair, tmp_path: Path) -> None:
    """llama.cpp itself has them in that order there."""
    stems = ("attn_q", "attn_k", "attn_v")
    assert told_of(make_pair("qwen2"), beside(stems, "scale"), folder=tmp_path) is None


def test_one_factor_left_out(make_pair: MakePair, tmp_path: Path) -> None:
    """The engine's file lacks the factors of one matrix of three."""
    wrong = Wrong(names=lambda name: None if name.endswith("ffn_up.scale") else name)
    told = told_of(make_pair("llama"), beside(FFN, "scale"), folder=tmp_path, wrong=wrong)
    assert told is not None and told.found, told
    assert [row.says for row in told.hypotheses] == ["the factors ffn_up.scale were left out"], told.answer


def test_biases_of_a_part_left_out(make_pair: MakePair, tmp_path: Path) -> None:
    wrong = Wrong(names=lambda name: None if ".attn_" in name and name.endswith(".bias") else name)
    biases = beside(("attn_q", "attn_k", "attn_v", *FFN), "bias")
    told = told_of(make_pair("llama"), biases, folder=tmp_path, wrong=wrong)
    assert told is not None and told.found, told
    assert told.hypotheses[0].says == "biases of attention's matrices were left out", told.answer


def test_factors_left_out(qwen2vl: Pair, tmp_path: Path) -> None:
    told = told_of(qwen2vl, beside(FFN, "scale"), folder=tmp_path)
    assert told is not None and told.found, told
    assert told.hypotheses[0].says == LEFT_OUT, told.answer


def test_the_bias_of_the_logits_left_out(qwen2vl: Pair, tmp_path: Path) -> None:
    told = told_of(qwen2vl, output_bias, folder=tmp_path)
    assert told is not None and told.found, told
    assert told.hypotheses[0].says == OUTPUT_BIAS and told.hypotheses[0].tap == "logits", told.answer


def test_both_are_told_one_after_the_other(qwen2vl: Pair, tmp_path: Path) -> None:
    told = told_of(qwen2vl, beside(FFN, "scale"), output_bias, folder=tmp_path)
    assert told is not None and told.found, told
    both, first, *_ = told.hypotheses
    assert both.says == f"{LEFT_OUT}, and {OUTPUT_BIAS}" and both.names == ["scale.absent", "bias.absent"], told.answer
    assert first.says == LEFT_OUT and first.fits == "partly" and first.remaining == ["logits"]


def test_a_bias_of_the_logits_that_is_added_is_no_difference(make_pair: MakePair, tmp_path: Path) -> None:
    assert told_of(make_pair("qwen2"), output_bias, folder=tmp_path) is None


def normalised_keys_as_values(
    me: Any, plain: Any, w: Any, il: int, x: Tensor, cos: Tensor, sin: Tensor, tap: Any
) -> tuple[Tensor, Tensor]:
    """Where a layer has no value projection."""
    seen: dict[str, Tensor] = {}
    own = w.has(f"blk.{il}.attn_v.weight")
    k, v = plain(w, il, x, cos, sin, lambda name, value: seen.update({name: value}))
    if not own:
        seen["attn_v_norm"] = seen["attn_k_norm"]
        v = seen["attn_v_norm"].unflatten(-1, v.shape[-2:])
    for name, value in seen.items():
        tap(name, value)
    return k, v


def test_values_of_keys_have_the_factor_of_keys(make_pair: MakePair, tmp_path: Path) -> None:
    # A small factor, at which the epsilon of the keys' norm tells it from none.
    scaled = extended(
        make_pair("gemma4"),
        lambda source: {
            name: np.asarray(value / 50, np.float32) for name, value in beside(["attn_k"], "scale")(source).items()
        },
        folder=tmp_path,
    )
    told = explain_planted(scaled, {"keys_values": normalised_keys_as_values}, tmp_path)
    assert told is not None and told.found, told
    assert told.hypotheses[0].says == "values were the normalised keys", told.answer
