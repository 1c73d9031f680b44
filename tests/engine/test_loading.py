"""An engine's own libraries are loaded, and one that cannot be says why in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffharness.engine import loading
from diffharness.errors import EngineError


@pytest.fixture(scope="module")
def llama() -> Any:
    return loading.load_llama()


def test_only_the_low_level_module_is_loaded(llama: Any) -> None:
    assert llama.__name__ == "llama_cpp.llama_cpp"
    assert llama.llama_context_default_params().n_batch == 2048


def test_one_copy_of_libggml_base(llama: Any) -> None:
    ggml = loading.load_ggml(llama)
    assert len(loading.loaded_libraries("libggml-base")) == 1
    assert Path(ggml.library._name).samefile(loading.loaded_libraries("libggml-base")[0])


def test_structures_are_checked_on_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(llama: Any) -> None:
        raise EngineError("they do not fit")

    monkeypatch.setattr(loading, "check_structures", refuse)
    with pytest.raises(EngineError, match="they do not fit"):
        loading.load_llama()


def test_bindings_that_are_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_CALLED", ("llama_of_tomorrow",))
    with pytest.raises(EngineError, match="has no llama_of_tomorrow"):
        loading.load_llama()


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
    told = loading._not_loaded(error)
    assert says in told.message and str(error) in told.message and told.hint
