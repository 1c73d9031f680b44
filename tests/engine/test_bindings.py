"""The ctypes mirror: what the library says is checked before it is believed."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffharness.engine import bindings
from diffharness.errors import EngineError


@pytest.fixture(scope="module")
def llama() -> Any:
    return bindings.load_llama()


@pytest.fixture(scope="module")
def ggml(llama: Any) -> bindings.Ggml:
    return bindings.load_ggml(llama)


def test_only_the_low_level_module_is_loaded(llama: Any) -> None:
    assert llama.__name__ == "llama_cpp.llama_cpp"
    assert llama.llama_context_default_params().n_batch == 2048


def test_one_copy_of_libggml_base(llama: Any, ggml: bindings.Ggml) -> None:
    assert len(bindings.loaded_libraries("libggml-base")) == 1
    assert Path(ggml.library._name).samefile(bindings.loaded_libraries("libggml-base")[0])


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
        bindings.load_ggml(bindings.load_llama())


def test_structures_are_checked_on_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(llama: Any) -> None:
        raise EngineError("they do not fit")

    monkeypatch.setattr(bindings, "check_structures", refuse)
    with pytest.raises(EngineError, match="they do not fit"):
        bindings.load_llama()


def test_bindings_that_are_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "_CALLED", ("llama_of_tomorrow",))
    with pytest.raises(EngineError, match="has no llama_of_tomorrow"):
        bindings.load_llama()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            AttributeError("/x/libllama.so: undefined symbol: llama_version"),
            "has no llama_version, which these bindings call",
        ),
        (ImportError("No module named 'typing_extensions'"), "has no typing_extensions"),
        (
            RuntimeError("/x/libllama.so: wrong ELF class: ELFCLASS32"),
            "not for this processor and system, or not whole",
        ),
        (RuntimeError("/lib/libc.so.6: version `GLIBC_2.38' not found"), "needs GLIBC_2.38 of the system"),
        (
            RuntimeError("libcudart.so.12: cannot open shared object file: No such file or directory"),
            "the library needs libcudart.so.12, which is not here",
        ),
        (OSError("something new"), "llama_cpp does not load: something new"),
    ],
)
def test_what_the_loader_says_in_words(error: Exception, says: str) -> None:
    told = bindings._not_loaded(error)
    assert says in told.message and str(error) in told.message and told.hint
