"""A forward that starts at a layer gives bit for bit what the whole forward gives, and reads nothing before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffharness.errors import OutputError
from diffharness.reference import runner
from diffharness.reference.prefix import Prefix
from diffharness.reference.runner import Reference
from diffharness.weights.names import MAPS
from diffharness.weights.source import Overlay
from diffharness.weights.synth import SynthSource
from tests.oracles import tiny, tiny_gemma
from tests.oracles.conftest import Tiny
from tests.oracles.conftest import make_tiny as make_tiny  # a fixture that other folders share
from tests.reference.random_source import LLAMA, RandomSource

CASES = [*tiny.CASES, *tiny_gemma.CASES]


def ids(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 40, n)


def logits(reference: Reference, chunks: list[Any], prefix: Prefix | None = None) -> torch.Tensor:
    out = reference.run(chunks, prefix=prefix)
    assert out is not None
    return out


@pytest.mark.parametrize("case", CASES)
def test_every_start_gives_the_same_bits(make_tiny: Callable[..., Tiny], case: str) -> None:
    made = make_tiny(case)
    tokens = made.ids.numpy()
    chunks = [tokens[:30], tokens[30:60], tokens[60:]]  # two lengths: two groups
    reference = Reference(made.checkpoint)
    whole, prefix = logits(reference, chunks), Prefix()
    assert torch.equal(logits(reference, chunks, prefix), whole)
    n_layer = reference.model.n_layer
    assert prefix.end == n_layer
    for boundary in range(n_layer + 1):
        started = prefix.branch(boundary)
        assert torch.equal(logits(reference, chunks, started), whole), boundary
        assert started.end == n_layer
    again = prefix.branch(1).branch(1)
    logits(reference, chunks, again)
    assert torch.equal(logits(reference, chunks, again.branch(n_layer - 1)), whole)


@pytest.mark.parametrize("arch", MAPS)
def test_no_architecture_hands_on_more_than_is_kept(arch: str) -> None:
    source = SynthSource(arch)
    reference, chunks, prefix = Reference(source), [ids(30), ids(30, 1), ids(19)], Prefix()
    whole = logits(reference, chunks, prefix)
    for boundary in {1, reference.model.n_layer // 2, reference.model.n_layer - 1}:
        assert torch.equal(logits(reference, chunks, prefix.branch(boundary)), whole), boundary


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_weights_from_a_layer_on(dtype: str) -> None:
    base, other, chunks = RandomSource(LLAMA), RandomSource(LLAMA, seed=1), [ids(9), ids(9, 1), ids(5)]
    prefix = Prefix()
    logits(Reference(base, dtype=dtype), chunks, prefix)
    mixed = Overlay(base, other, lambda name: name.startswith("blk.1."))
    expected = logits(Reference(mixed, dtype=dtype), chunks)
    branch = prefix.branch(1)
    base.reads.clear()
    assert torch.equal(logits(Reference(mixed, dtype=dtype), chunks, branch), expected)
    assert not [name for name in base.reads if name.startswith("blk.0.")]
    assert not torch.equal(expected, logits(Reference(base, dtype=dtype), chunks))
    # what the branch recorded is the mixture's own
    assert torch.equal(logits(Reference(mixed, dtype=dtype), chunks, branch.branch(2)), expected)
    assert torch.equal(
        logits(Reference(base, dtype=dtype), chunks, prefix.branch(2)), logits(Reference(base, dtype=dtype), chunks)
    )


def test_taps_before_the_start_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_GROUP_TOKENS", 16)
    reference, prefix = Reference(RandomSource(LLAMA)), Prefix()
    told: list[str] = []
    logits(reference, [ids(8), ids(8, 1), ids(8, 2)], prefix)
    reference.run([ids(8), ids(8, 1), ids(8, 2)], on_tap=lambda name, *_: told.append(name), prefix=prefix.branch(2))
    assert {name.split(".")[1] for name in told if name.startswith("blk.")} == {"2"}
    assert "token_embd" not in told and "logits" in told


def test_a_prefix_of_other_chunks_is_refused() -> None:
    reference, prefix = Reference(RandomSource(LLAMA)), Prefix()
    logits(reference, [ids(8)], prefix)
    with pytest.raises(ValueError, match="chunks and the dtype"):
        reference.run([ids(8, 1)], prefix=prefix)
    with pytest.raises(ValueError, match="chunks and the dtype"):
        Reference(RandomSource(LLAMA), dtype="float64").run([ids(8)], prefix=prefix)
    with pytest.raises(ValueError, match="own stream"):
        reference.run([ids(8)], prefix=Prefix(), engine_inputs=lambda layer: None, on_tap=lambda *_: None)
    with pytest.raises(ValueError, match="cannot be branched at boundary 4"):
        prefix.branch(4)
    with pytest.raises(ValueError, match="ends at None"):
        Prefix().branch(0)


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="activations cannot be kept"):
        Reference(RandomSource(LLAMA)).run([ids(8)], prefix=Prefix(tmp_path / "none"))


def test_the_file_goes_with_its_last_prefix(tmp_path: Path) -> None:
    prefix = Prefix(tmp_path)
    logits(Reference(RandomSource(LLAMA)), [ids(8)], prefix)
    assert list(tmp_path.iterdir()) == []
    assert prefix.n_bytes == 4 * 8 * 24 * 4  # boundaries, tokens, width, float32
    branch = prefix.branch(3)
    assert branch.n_bytes == 0
    expected = logits(Reference(RandomSource(LLAMA)), [ids(8)])
    del prefix
    assert torch.equal(logits(Reference(RandomSource(LLAMA)), [ids(8)], branch), expected)
