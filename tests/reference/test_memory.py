"""What a forward is said to need at the least: against the shapes, and against what it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.peak import mark, status
from diffharness.errors import UnsupportedError
from diffharness.reference import memory
from diffharness.reference.runner import Reference
from diffharness.weights.source import Float32Array, IntArray
from tests.reference.random_source import LLAMA, QWEN3MOE, RandomSource


def llama(**sizes: int) -> dict[str, Any]:
    return LLAMA | {f"llama.{key}": value for key, value in sizes.items()}


def chunks(*lengths: int) -> list[IntArray]:
    return [np.zeros(length, dtype=np.int64) for length in lengths]


class Copies(RandomSource):
    """Reads into memory of its own, as a file does."""

    def read(self, name: str) -> Float32Array:
        return super().read(name).copy()

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return super().take(name, rows).copy()


def test_of_one_group_the_largest_matrix_counts() -> None:
    source = RandomSource(llama(feed_forward_length=60))
    need = memory.need(source, chunks(10, 10))
    assert need.streams == 4 * 20 * 24
    assert need.weights == 4 * 60 * 24 and need.heaviest.startswith("blk.0.ffn_")
    assert need.values == 4 * 20 * 60
    assert need.logits == 4 * 20 * 40
    assert need.total == need.streams + need.weights + need.values
    assert memory.need(source, chunks(10), keep_logits=False).logits == 0


def test_of_several_groups_a_layer_counts() -> None:
    source = RandomSource(LLAMA)
    need = memory.need(source, chunks(3000, 3000))
    in_layer = sum(info.n_elements for name, info in source.tensors.items() if name.startswith("blk.0."))
    assert need.heaviest == "layer 0" and need.weights == 4 * in_layer
    assert need.values == 4 * 3000 * 32  # what the 4 heads of 8 ask


def test_of_a_stack_of_experts_one_counts() -> None:
    experts = {"qwen3moe.expert_feed_forward_length": 100}
    source = RandomSource(QWEN3MOE | experts)
    assert memory.need(source, chunks(10)).weights == 4 * 24 * 100


@pytest.mark.parametrize(
    ("sizes", "n_tokens"),
    [
        ({"feed_forward_length": 6000, "embedding_length": 1200, "block_count": 2}, 50),
        ({"feed_forward_length": 16000}, 1500),
        ({"vocab_size": 30000}, 1500),
    ],
)
def test_a_forward_takes_no_less(sizes: dict[str, int], n_tokens: int) -> None:
    source = Copies(llama(context_length=4096, **sizes))
    before = mark()
    Reference(source).run(chunks(n_tokens))
    taken = status("VmHWM") - before
    assert 0.9 * memory.need(source, chunks(n_tokens)).total < taken


def test_too_much_is_refused_with_the_need_and_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = 100_000
    monkeypatch.setattr(memory, "available_memory", lambda: there)
    small, wide = RandomSource(LLAMA), RandomSource(llama(feed_forward_length=2000))
    memory.require(small, chunks(10))
    with pytest.raises(
        UnsupportedError, match=r"random: the reference needs at least 0\.0 GB .*ffn_.*float32"
    ) as caught:
        memory.require(wide, chunks(10))
    assert caught.value.hint == "use a machine with more memory" and caught.value.exit_code == 2
    assert caught.value.tensor is not None and "ffn" in caught.value.tensor
    with pytest.raises(UnsupportedError, match="for their logits") as caught:
        memory.require(RandomSource(llama(vocab_size=300)), chunks(90))
    assert "--tokens" in str(caught.value.hint)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    memory.require(wide, chunks(10))
