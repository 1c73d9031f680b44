"""What kernels are given: sources in any type and layout, tensors of the file and views of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffharness.errors import EngineError
from diffharness.recorded import Value
from diffharness.replay.call import Call
from diffharness.weights.gguf_write import encode_floats
from tests.replay.nodes import NoWeights, blocks, node, params, value, weight

X = np.random.default_rng(1).standard_normal((2, 3, 4, 32)).astype(np.float32)


def call(*sources: Value | None, **weights: np.ndarray) -> Call:  # type: ignore[type-arg]
    return Call(node("FOO", (1, 1, 1, 1), *sources, op_params=params(7, 0.5, -3)), NoWeights(**weights))


def test_parameters() -> None:
    found = call(None, value(X))
    assert (found.i(0), found.f(1), found.i(2)) == (7, 0.5, -3)
    assert not found.has(0) and found.has(1) and not found.has(2)
    with pytest.raises(EngineError, match="no source 0"):
        found.x(0)


def test_types() -> None:
    half = X.astype(np.float16)
    np.testing.assert_array_equal(call(value(half)).x(0).numpy(), half.astype(np.float32))
    stored = encode_floats(X.reshape(-1, 32), "BF16")
    brain = X.view(np.uint32)
    found = call(blocks(stored, "BF16", X.shape)).x(0).numpy()
    assert found.shape == X.shape and np.abs(found - X).max() < 0.02 and not np.array_equal(found, brain)
    ids = np.arange(6, dtype=np.int32).reshape(1, 1, 2, 3)
    assert call(value(ids)).ints(0).dtype == torch.int64
    with pytest.raises(EngineError, match="not integers"):
        call(value(X)).ints(0)


def test_layouts() -> None:
    for array in (X.transpose(0, 2, 1, 3), X.transpose(0, 1, 3, 2), X[:, 1:, ::2, 4:9], X[:, :1].repeat(1, axis=1)):
        np.testing.assert_array_equal(call(value(array)).x(0).numpy(), array)


def test_what_reaches_beyond_its_bytes_is_refused() -> None:
    short = replace(value(X), raw=value(X).raw[:-1])  # type: ignore[index]
    with pytest.raises(EngineError, match="bytes"):
        call(short).x(0)


def test_tensors_of_the_file() -> None:
    table = X[0, 0]
    np.testing.assert_array_equal(call(weight("w", table.shape), w=table).x(0).numpy()[0, 0], table)
    with pytest.raises(EngineError, match="does not have"):
        call(weight("v", table.shape), w=table).x(0)
    with pytest.raises(EngineError, match="the file has 128"):
        call(weight("w", (5, 32)), w=table).x(0)


def test_views_of_tensors_of_the_file() -> None:
    table = X[0, 0]
    half = replace(weight("w", (2, 32)), offset=2 * 32 * 4)
    np.testing.assert_array_equal(call(half, w=table).x(0).numpy()[0, 0], table[2:])
    turned = Value("w", "F32", (1, 1, 32, 4), (512, 512, 4, 128), None)
    np.testing.assert_array_equal(call(turned, w=table).x(0).numpy()[0, 0], table.T)
    quantized = Value("w", "Q8_0", (1, 1, 2, 32), (68, 68, 34, 34), None, offset=68)  # the file's rows 2 and 3
    np.testing.assert_array_equal(call(quantized, w=table).x(0).numpy()[0, 0], table[2:])
