"""The output head in chunks of rows: the same logits as in one product, with autograd and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffharness.reference import ops
from diffharness.reference.model import unheard
from diffharness.reference.weights import SourceWeights
from tests.reference.random_source import LLAMA, RandomSource

N_VOCAB, N_EMBD = LLAMA["llama.vocab_size"], LLAMA["llama.embedding_length"]


def a_head_with_bias() -> SourceWeights:
    source = RandomSource(LLAMA)
    source.values["output.weight"] = source.values["token_embd.weight"][::-1].copy()
    source.values["output.bias"] = np.linspace(-1, 1, N_VOCAB, dtype=np.float32)
    return SourceWeights(source)


@pytest.mark.parametrize("rows", [1, 7, N_VOCAB], ids=["row by row", "uneven chunks", "one chunk"])
@pytest.mark.parametrize("n_tokens", [3, 80], ids=["few tokens", "as many as oneDNN is asked for"])
@pytest.mark.parametrize("autograd", [False, True])
def test_chunks_of_the_head_are_the_head(
    rows: int, n_tokens: int, autograd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_HEAD_BYTES", rows * N_EMBD * 4)
    w = a_head_with_bias()
    x = torch.randn(2, n_tokens, N_EMBD, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(autograd):
        found = ops.logits(w, x, unheard, cap=2.0, scale=0.5)
    plain = (x.double() @ w.get("output.weight").double().T + w.get("output.bias")) * 0.5
    expected = torch.tanh(plain / 2.0) * 2.0
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert not torch.allclose(found.double(), plain, atol=1e-2)  # the cap was seen
