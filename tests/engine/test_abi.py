"""Structures of another layout are seen before they are believed: every field moved, removed, added, grown."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import pytest

from diffharness.engine import abi, loading
from diffharness.errors import EngineError

seen = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="what is written is not seen on this processor"
)


@pytest.fixture(scope="module")
def llama() -> Any:
    return loading.load_llama()


STRUCTURES = list(abi.PROBES)


def probed(llama: Any, function: str) -> tuple[type[ctypes.Structure], abi.Known, bytes, frozenset[int] | None]:
    structure, known = abi.PROBES[function]
    mirror = getattr(llama, structure)
    return mirror, known, *abi.probe(llama._lib[function], ctypes.sizeof(mirror) + 64)


def struct(fields: list[Any]) -> type[ctypes.Structure]:
    return type("Other", (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize("function", STRUCTURES)
def test_the_installed_library_fits(llama: Any, function: str) -> None:
    assert abi.misfit(*probed(llama, function)) is None
    abi.check_structures(llama)


@seen
@pytest.mark.parametrize("function", STRUCTURES)
def test_another_size_is_seen(llama: Any, function: str) -> None:
    """The library's structure is larger or smaller than the mirror by one field at the end."""
    mirror, known, raw, written = probed(llama, function)
    larger, smaller = [*mirror._fields_, ("new", ctypes.c_int64)], list(mirror._fields_)
    while ctypes.sizeof(struct(smaller)) == ctypes.sizeof(mirror):
        smaller.pop()
    for fields in (larger, smaller):
        said = abi.misfit(struct(fields), known, raw, written)
        assert said is not None and "bytes there" in said, said


@seen
@pytest.mark.parametrize("kind", [ctypes.c_bool, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p])
@pytest.mark.parametrize("function", STRUCTURES)
def test_a_field_that_the_library_lacks_is_seen_wherever_it_is(llama: Any, function: str, kind: Any) -> None:
    mirror, known, raw, written = probed(llama, function)
    fields = list(mirror._fields_)
    for at in range(len(fields) + 1):
        other = struct([*fields[:at], ("new", kind), *fields[at:]])
        assert abi.misfit(other, known, raw, written) is not None, f"not seen before field {at}"


@seen
@pytest.mark.parametrize("function", STRUCTURES)
def test_a_field_that_the_bindings_lack_is_seen_unless_it_is_a_twin(llama: Any, function: str) -> None:
    """What goes unseen moves nothing, or only fields of the same type and default as the missing one."""
    mirror, known, raw, written = probed(llama, function)
    fields, params = list(mirror._fields_), mirror.from_buffer_copy(raw)
    for at, (missing, kind) in enumerate(fields):
        other = struct(fields[:at] + fields[at + 1 :])
        if abi.misfit(other, known, raw, written) is None:
            moved = [(n, k) for n, k in other._fields_ if getattr(other, n).offset != getattr(mirror, n).offset]
            twins = [k is kind and getattr(params, n) == getattr(params, missing) for n, k in moved]
            assert all(twins), (missing, moved)


def test_other_defaults_are_told(llama: Any) -> None:
    mirror, known, raw, written = probed(llama, "llama_context_default_params")
    said = abi.misfit(mirror, {**known, "n_ctx": (513,)}, raw, written)
    assert said == "has n_ctx = 512 by default, 513 expected"
    with_pointer = bytearray(raw)
    with_pointer[mirror.cb_eval.offset] = 1  # type: ignore[attr-defined]
    said = abi.misfit(mirror, known, bytes(with_pointer), written)
    assert said is not None and "cb_eval" in said


def test_a_batch_laid_out_otherwise_is_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = list(llama.llama_batch._fields_)
    fields[1], fields[2] = fields[2], fields[1]
    monkeypatch.setattr(llama, "llama_batch", struct(fields))
    with pytest.raises(EngineError, match="llama_batch is laid out otherwise") as caught:
        abi.check_structures(llama)
    assert caught.value.hint


def test_a_misfit_is_an_engine_error(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [("new", ctypes.c_int64), *llama.llama_model_params._fields_]
    monkeypatch.setattr(llama, "llama_model_params", struct(fields))
    with pytest.raises(EngineError, match="does not fit these bindings: llama_model_params") as caught:
        abi.check_structures(llama)
    assert caught.value.exit_code == 125
