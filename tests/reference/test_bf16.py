"""Products in bfloat16: what is rounded, what is not, and that no comparison with an engine can have them."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import diffharness
from diffharness.metrics import nmse
from diffharness.reference import bf16, moe, ops, recurrent
from diffharness.reference.bf16 import Bf16Forward, Bf16Matrix, Bf16Weights
from diffharness.reference.runner import Reference
from diffharness.weights.names import MAPS
from diffharness.weights.synth import SynthSource
from tests.reference.random_source import LLAMA, QWEN3MOE, RandomSource

RNG = np.random.default_rng(3)


def random(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal(shape).astype(np.float32))


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).double()


def test_both_sides_are_rounded_and_sums_are_not() -> None:
    """Of exact sums of the rounded values, the result is the nearest bfloat16, or its neighbour."""
    weights = Bf16Weights(RandomSource(LLAMA))
    w = weights.get("blk.0.ffn_down.weight")
    plain = torch.from_numpy(weights.source.read("blk.0.ffn_down.weight"))
    x = random(2, 3, w.shape[1])
    exact = rounded(x) @ rounded(plain).T
    found = ops.linear(x, w)
    assert type(found) is torch.Tensor and found.dtype == torch.float32
    size = (rounded(x).abs() @ rounded(plain).abs().T) * 2**-20  # of float32 sums
    assert ((found - exact).abs() <= exact.abs() * 2**-8 + size).all()
    assert nmse(found.numpy(), ops.linear(x, plain).numpy()) > 1e-7  # the plain product is another one
    bias = random(w.shape[0])
    assert torch.equal(ops.linear(x, w, bias), found + bias)


def test_a_large_matrix_is_rounded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = random(1, 7, 24), random(50, 24).as_subclass(Bf16Matrix)
    whole = ops.linear(x, w)
    monkeypatch.setattr(bf16, "_BLOCK_ELEMENTS", 7 * 24)
    assert torch.equal(ops.linear(x, w), whole)
    monkeypatch.setattr(bf16, "_BLOCK_ELEMENTS", 1)
    assert torch.equal(ops.linear(x, w), whole)


def test_parts_of_a_matrix_and_stacks_are_rounded_too() -> None:
    stack, x = random(4, 10, 24), random(5, 24)
    marked = stack.as_subclass(Bf16Matrix)
    for found, expected in (
        (ops.linear(x, marked[2]), ops.linear(x, stack[2].as_subclass(Bf16Matrix))),
        (torch.cat([ops.linear(x, part) for part in marked], dim=-1), ops.linear(x, marked.reshape(40, 24))),
        (torch.matmul(x.expand(4, -1, -1), marked.mT), torch.stack([ops.linear(x, part) for part in marked])),
        (x @ marked[1].T, ops.linear(x, marked[1])),
    ):
        assert nmse(found.numpy(), expected.numpy()) < 1e-5  # a sum in another order may be rounded to a neighbour
        assert type(found) is torch.Tensor
    weights = Bf16Weights(RandomSource(QWEN3MOE))
    assert isinstance(moe.matrix(weights, "blk.1.ffn_up_exps.weight", 2), Bf16Matrix)


def test_whatever_is_no_product_has_the_values_as_they_are() -> None:
    plain, x = random(24, 4), random(1, 9, 24)
    w = plain.as_subclass(Bf16Matrix)
    assert torch.equal(w * 1, plain) and type(w * 1) is torch.Tensor
    assert torch.equal(recurrent.causal_conv(x, w), recurrent.causal_conv(x, plain))
    assert torch.equal(torch.einsum("btr,rk->btk", x, w), torch.einsum("btr,rk->btk", x, plain))


def test_norms_embeddings_head_and_routers_are_plain() -> None:
    weights = Bf16Weights(RandomSource(QWEN3MOE))
    assert type(weights.get("blk.0.attn_norm.weight")) is torch.Tensor
    assert type(weights.get("blk.0.ffn_gate_inp.weight")) is torch.Tensor
    assert type(weights.rows("token_embd.weight", slice(0, 4))) is torch.Tensor
    assert type(ops.embed(weights, torch.tensor([[1, 2, 1]]))) is torch.Tensor
    assert isinstance(weights.get("blk.0.attn_q.weight"), Bf16Matrix)


@pytest.mark.parametrize("arch", MAPS)
def test_every_architecture_has_noise_and_no_more(arch: str) -> None:
    source = SynthSource(arch)
    generator = np.random.default_rng(1)
    ids = generator.integers(0, source.tensors["token_embd.weight"].shape[0], 24)
    exact, coarse = Reference(source).run([ids]), Bf16Forward(source).run([ids])
    assert exact is not None and coarse is not None
    assert 1e-7 < nmse(coarse.numpy(), exact.numpy()) < 0.1  # at the upper end experts were chosen otherwise


def test_a_matrix_that_is_rounded_by_mistake_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same measure on a forward that damages the weights."""
    source, ids = RandomSource(LLAMA), np.arange(24)
    exact = Reference(source).run([ids])
    monkeypatch.setattr(bf16, "_multiplying", lambda name, values: values.round() if values.dim() > 1 else values)
    coarse = Bf16Forward(source).run([ids])
    assert exact is not None and coarse is not None and nmse(coarse.numpy(), exact.numpy()) > 0.1


# -- never where an engine is judged -------------------------------------------------------------------


def test_it_cannot_be_fed_with_an_engines_numbers() -> None:
    with pytest.raises(TypeError, match="engine_inputs"):
        Bf16Forward(RandomSource(LLAMA)).run([np.arange(4)], engine_inputs=lambda layer: None)  # type: ignore[call-arg]


def test_only_grade_knows_of_it() -> None:
    root = Path(diffharness.__file__).parent
    known: dict[str, set[str]] = {"diffharness.reference.bf16": set(), "diffharness.pipeline.grade_bf16": set()}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in known.keys() & set(names):
                known[name].add(path.relative_to(root).as_posix())
    assert known == {
        "diffharness.reference.bf16": {"pipeline/grade_bf16.py"},
        "diffharness.pipeline.grade_bf16": {"pipeline/grade_inputs.py", "pipeline/grading.py"},
    }
