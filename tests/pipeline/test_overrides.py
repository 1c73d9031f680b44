from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from diffharness.engine.known_keys import known_keys
from diffharness.engine.runner import Engine
from diffharness.errors import SettingsError
from diffharness.pipeline import overrides
from diffharness.records import Finding
from diffharness.settings import EngineSettings, load_engine

TYPES = {"a.base": "FLOAT32", "a.window": "UINT32", "a.heads": "ARRAY[INT32]", "a.flag": "BOOL", "a.name": "STRING"}


def test_overrides_of_the_keys_own_type_pass() -> None:
    fit = ["a.base=float:1e4", "a.window=int:32", "a.flag=bool:true", "a.name=str:x"]
    assert overrides.check(fit, TYPES) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("a.base=int:5", ("FLOAT32", "a.base=float:VALUE")),
        ("a.window=float:5", ("UINT32", "a.window=int:VALUE")),
        ("a.heads=int:5", ("array",)),
        ("a.base=5", ("KEY=TYPE:VALUE",)),
    ],
)
def test_what_llama_cpp_would_ignore_is_refused(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as error:
        overrides.check([override], TYPES)
    for word in words:
        assert word in str(error.value), word


def test_a_key_that_the_file_lacks_is_noted() -> None:
    [note] = overrides.check(["a.windwo=int:32"], TYPES)
    assert note.kind is None and "a.windwo=int:32" in note.message


LIBRARY = b"\0%s.block_count\0%s.rope.freq_base\0%s.rope.scaling.attn_factor\0tokenizer.ggml.model\0"


def checked_for(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: bytes = LIBRARY
) -> list[Finding]:
    """`check_for` on a file of `a` models, with an engine whose library holds these bytes."""
    file = tmp_path / "libllama.so"
    file.write_bytes(library)
    monkeypatch.setattr(overrides.Engine, "info", lambda engine: {"library": str(file)})
    known_keys.cache_clear()
    return overrides.check_for([override], SimpleNamespace(kv_types=TYPES, arch="a"), EngineSettings(name="x"))


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("foo=int:3", "spelled a.rope.freq_base"),
        ("a.windwo=int:32", "the nearest is a.window"),
        ("a.rope.freq_bas=float:1", "the nearest is a.rope.freq_base"),
        ("rope.freq_base=float:1", "the nearest is a.rope.freq_base"),  # without the architecture
        ("b.rope.freq_base=float:1", "the nearest is a.rope.freq_base"),  # another architecture's
    ],
)
def test_a_key_that_nobody_reads_is_refused(
    override: str, nearest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError) as error:
        checked_for(override, tmp_path, monkeypatch)
    key = override.partition("=")[0]
    assert f"found {key!r}" in error.value.message and nearest in str(error.value.hint)


def test_a_key_that_the_file_lacks_and_the_engine_reads_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for override in ("a.rope.scaling.attn_factor=float:1", "tokenizer.ggml.model=str:x"):
        [note] = checked_for(override, tmp_path, monkeypatch)
        assert note.kind is None and override in note.message
    assert checked_for("a.window=int:32", tmp_path, monkeypatch) == []


def test_a_library_that_does_not_tell_its_keys_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [note] = checked_for("foo=int:3", tmp_path, monkeypatch, library=b"\x7fELF nothing")
    assert "foo=int:3" in note.message


def test_the_engine_of_these_bindings_tells_its_keys() -> None:
    known = known_keys(str(Engine(load_engine("native")).info()["library"]))
    assert known is not None
    assert all(known.has(f"llama.{name}", "llama") for name in ("rope.freq_base", "attention.scale", "expert_count"))
    assert known.has("general.architecture", "llama")
    assert not any(
        known.has(key, "llama") for key in ("foo", "llama.attention.gizmo", "rope.freq_base", "a.block_count")
    )
