"""Reading one tensor ahead: what is read, when, and that nothing is left behind."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from diffharness.reference.runner import Reference
from diffharness.reference.weights import SourceWeights
from diffharness.weights.source import Float32Array
from tests.reference.random_source import LLAMA, QWEN3MOE, RandomSource


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


class SlowSource(RandomSource):
    """Notes which thread reads what."""

    def __init__(self) -> None:
        super().__init__(LLAMA)
        self.by_reader: list[str] = []

    def read(self, name: str) -> Float32Array:
        if threading.current_thread() is not threading.main_thread():
            self.by_reader.append(name)
        return super().read(name)


def test_the_second_layer_is_read_ahead_in_the_order_of_the_first() -> None:
    source = SlowSource()
    Reference(source).run([np.arange(6)])
    first = [name for name in source.reads if name.startswith("blk.0.")]
    assert not any(name in source.by_reader for name in first)
    for il in (1, 2):
        expected = [name.replace("blk.0.", f"blk.{il}.") for name in first]
        assert [name for name in source.by_reader if name.startswith(f"blk.{il}.")] == expected
    assert sorted(source.reads) == sorted(set(source.reads))
    assert readers() == []


def test_at_most_one_tensor_is_read_ahead() -> None:
    source = RandomSource(LLAMA)
    weights = SourceWeights(source)
    names = ["blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight"]
    for name in names:
        weights.get(name)
    weights.end_layer(0)
    weights.get("blk.1.attn_norm.weight")
    weights.get("blk.1.attn_q.weight")
    weights.close()
    expected = [*names, *(name.replace("blk.0", "blk.1") for name in names)]
    assert source.reads in (expected, expected[:-1])  # the last may be called off before it began


def test_a_layer_with_other_tensors_is_read_rightly() -> None:
    source = RandomSource(QWEN3MOE)
    weights = SourceWeights(source, dtype=torch.float64)
    weights.get("blk.0.attn_norm.weight")
    weights.get("blk.0.attn_q.weight")
    weights.end_layer(0)
    value = weights.get("blk.1.attn_v.weight")  # not what was expected
    assert value.dtype == torch.float64
    assert np.array_equal(value.numpy(), source.values["blk.1.attn_v.weight"])
    assert np.array_equal(weights.get("blk.1.attn_q.weight").numpy(), source.values["blk.1.attn_q.weight"])
    weights.close()
    assert readers() == []


def test_an_error_of_the_reader_reaches_the_run_and_ends_the_thread() -> None:
    class Broken(SlowSource):
        def read(self, name: str) -> Float32Array:
            if name == "blk.1.ffn_up.weight":
                raise OSError("the disk is gone")
            return super().read(name)

    with pytest.raises(OSError, match="the disk is gone"):
        Reference(Broken()).run([np.arange(6)])
    assert readers() == []


def test_missing_tensors() -> None:
    weights = SourceWeights(RandomSource(LLAMA))
    assert weights.find("blk.0.attn_q.bias") is None and not weights.has("blk.0.attn_q.bias")
    with pytest.raises(KeyError, match=r"blk\.0\.attn_q\.bias"):
        weights.get("blk.0.attn_q.bias")


def test_read_only_values_are_copied() -> None:
    source = RandomSource(LLAMA)
    source.values["output_norm.weight"].flags.writeable = False
    value = SourceWeights(source).get("output_norm.weight")
    value += 1
    assert not np.array_equal(value.numpy(), source.values["output_norm.weight"])
