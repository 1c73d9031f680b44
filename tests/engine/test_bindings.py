"""The ctypes mirror: what the library says is checked before it is believed."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffharness.engine import bindings, loading
from diffharness.errors import EngineError


@pytest.fixture(scope="module")
def llama() -> Any:
    return loading.load_llama()


@pytest.fixture(scope="module")
def ggml(llama: Any) -> bindings.Ggml:
    return loading.load_ggml(llama)


def test_types_by_name(llama: Any, ggml: bindings.Ggml) -> None:
    for name in ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"):
        assert ggml.type_name(ggml.type_id(name, llama)) == name
    with pytest.raises(EngineError, match="no tensor type Q4_9"):
        ggml.type_id("Q4_9", llama)


@pytest.fixture
def tensor(ggml: bindings.Ggml) -> Any:
    """A float32 tensor [5 columns, 4 rows] with values 0..19, in memory of its own."""
    context = ggml.library.ggml_init(bindings._InitParams(1 << 16, None, False))
    address = ggml.library.ggml_new_tensor_2d(context, 0, 5, 4)
    ggml.library.ggml_set_name(address, b"numbers")
    mirror = bindings.GgmlTensor.from_address(address)
    values = np.arange(20, dtype=np.float32)
    ctypes.memmove(mirror.data, values.ctypes.data, values.nbytes)
    # a buffer is only asked whether it is the host's, which the test answers itself
    mirror.buffer = 1
    yield address
    ggml.library.ggml_free(context)


def test_values_honour_strides(ggml: bindings.Ggml, tensor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(
        **{name: getattr(ggml.library, name) for name in ("ggml_nbytes", "ggml_type_name")},
        ggml_backend_buffer_is_host=lambda buffer: True,
    )
    monkeypatch.setattr(ggml, "library", library)
    np.testing.assert_array_equal(ggml.values(tensor, 4), np.arange(20).reshape(4, 5))
    mirror = bindings.GgmlTensor.from_address(tensor)
    mirror.ne[0] = 3  # a view of the first three columns
    np.testing.assert_array_equal(ggml.values(tensor, 4), np.arange(20).reshape(4, 5)[:, :3])
    mirror.ne[0], mirror.ne[1], mirror.nb[0], mirror.nb[1] = 4, 5, 20, 4  # transposed
    np.testing.assert_array_equal(ggml.values(tensor, 5), np.arange(20).reshape(4, 5).T)


def test_heads_are_joined(ggml: bindings.Ggml, tensor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(
        **{name: getattr(ggml.library, name) for name in ("ggml_nbytes", "ggml_type_name")},
        ggml_backend_buffer_is_host=lambda buffer: True,
    )
    monkeypatch.setattr(ggml, "library", library)
    mirror = bindings.GgmlTensor.from_address(tensor)
    mirror.ne[:], mirror.nb[:] = (5, 2, 2, 1), (4, 20, 40, 80)
    np.testing.assert_array_equal(ggml.values(tensor, 2), np.arange(20).reshape(2, 10))


def test_integers_are_not_taken_for_floats(ggml: bindings.Ggml, tensor: int) -> None:
    bindings.GgmlTensor.from_address(tensor).type = 26  # GGML_TYPE_I32
    with pytest.raises(EngineError, match="numbers holds I32"):
        ggml.values(tensor, 4)


def test_quantize_refuses_what_does_not_fit(llama: Any, ggml: bindings.Ggml) -> None:
    with pytest.raises(EngineError, match="do not divide"):
        ggml.quantize(np.zeros((2, 100), np.float32), ggml.type_id("Q4_K", llama))
    with pytest.raises(EngineError, match="importance"):
        ggml.quantize(np.zeros((2, 256), np.float32), ggml.type_id("IQ2_XXS", llama))


def test_a_layout_that_does_not_fit_is_refused(ggml: bindings.Ggml, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ctypes.Structure):
        _fields_ = [("new", ctypes.c_int64), *bindings.GgmlTensor._fields_]

    class Swapped(ctypes.Structure):
        # the same size, two fields the other way round
        _fields_ = [
            *[("nb", ctypes.c_size_t * 4) if f[0] == "ne" else ("ne", ctypes.c_int64 * 4) if f[0] == "nb" else f
              for f in bindings.GgmlTensor._fields_]
        ]  # fmt: skip

    for mirror, says in ((Shifted, "bytes here"), (Swapped, "not where they are expected")):
        monkeypatch.setattr(bindings, "GgmlTensor", mirror)
        with pytest.raises(EngineError, match=says):
            bindings.Ggml(ggml.library)


def test_a_library_without_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bindings._SIGNATURES, "ggml_of_tomorrow", (None, []))
    with pytest.raises(EngineError, match="no function ggml_of_tomorrow"):
        loading.load_ggml(loading.load_llama())
