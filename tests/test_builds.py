"""What `--engine` names: builds and interpreters found where they are, and plain words for what is none."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from diffharness import builds
from diffharness.builds import find_engine
from diffharness.errors import EngineError, SettingsError

SPEC = importlib.util.find_spec("llama_cpp")
assert SPEC is not None and SPEC.submodule_search_locations
LIBRARIES = Path(SPEC.submodule_search_locations[0]) / "lib"

linux = pytest.mark.skipif(sys.platform != "linux", reason="libraries are ELF files there")


def library(folder: Path, *, machine: int | None = None) -> Path:
    """A file that begins as this interpreter's libllama does, for the processor `machine`."""
    folder.mkdir(parents=True, exist_ok=True)
    head = bytearray((LIBRARIES / "libllama.so").read_bytes()[:64])
    if machine is not None:
        head[18:20] = machine.to_bytes(2, "little")
    (folder / "libllama.so").write_bytes(head)
    return folder


def test_names_and_files_are_settings(tmp_path: Path) -> None:
    assert find_engine("native").name == "native" and find_engine("strict").type_k == "F32"
    (tmp_path / "mine.yaml").write_text("n_ubatch: 7\n")
    assert find_engine(tmp_path / "mine.yaml").n_ubatch == 7


@linux
@pytest.mark.parametrize("place", ["", "bin", "lib", "build/bin"])
def test_a_folder_of_libraries(tmp_path: Path, place: str) -> None:
    found = find_engine(library(tmp_path / place) and tmp_path)
    assert found.lib_dir == tmp_path / place and found.python is None
    assert found.name == str(tmp_path) and find_engine("native").differences(found).keys() == {"lib_dir"}


@linux
def test_the_library_itself_stands_for_its_folder(tmp_path: Path) -> None:
    assert find_engine(library(tmp_path) / "libllama.so").lib_dir == tmp_path


@linux
def test_the_installed_libraries(tmp_path: Path) -> None:
    assert find_engine(LIBRARIES).lib_dir == LIBRARIES


def test_an_interpreter_and_its_environment(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin" / "python"
    link.symlink_to(sys.executable)
    for word in (tmp_path, link):
        found = find_engine(word)
        assert found.python == link and found.lib_dir is None, "the link, which knows its packages, stays"


def test_relative_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    found = find_engine("venv")
    assert found.name == "venv" and found.python == tmp_path / "venv" / "bin" / "python"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "absent", "no such file or folder"),
        (lambda folder: folder, "no libllama"),
        (lambda folder: _written(folder / "notes.txt"), "neither YAML nor executable"),
        (lambda folder: _written(folder / "libllama.a").parent, "static library"),
        (lambda folder: _written(folder / "build" / "src" / "libllama.a").parents[2], "static library"),
    ],
)
def test_what_is_none(tmp_path: Path, make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SettingsError, match=says) as caught:
        find_engine(make(tmp_path))
    assert caught.value.exit_code == 2 and caught.value.hint


def _written(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    return path


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="no engine settings are called natvie") as caught:
        find_engine("natvie")
    assert "native" in str(caught.value)


@linux
def test_a_library_for_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds.platform, "machine", lambda: "x86_64")
    with pytest.raises(EngineError, match="built for AArch64, and this machine is x86-64") as caught:
        find_engine(library(tmp_path, machine=183))
    assert caught.value.exit_code == 125, "a build that does not run, which a bisection skips"
    with pytest.raises(EngineError, match="built for processor 999"):
        find_engine(library(tmp_path, machine=999))


@linux
def test_what_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(EngineError, match="no library of this system"):
        find_engine(tmp_path)


def test_an_executable_is_an_interpreter(tmp_path: Path) -> None:
    script = _written(tmp_path / "run-python")
    script.chmod(0o755)
    assert find_engine(script).python == script and os.access(script, os.X_OK)
