"""What `--engine` names: settings by name or file, a folder of another build's libraries, or another interpreter.

Only what can be seen without running anything is checked here: that there is a libllama in the folder, that
it is for this processor, that an interpreter can be executed. Whether the libraries fit the bindings, and
whether the interpreter has any, is found out by the worker when it loads them.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from diffharness.errors import EngineError, SettingsError
from diffharness.settings import EngineSettings, configs_dir, engine_names, load_engine

_LIBRARIES = ("libllama.so", "libllama.dylib", "llama.dll")
_PLACES = ("", "bin", "lib", "build/bin")  # of a CMake build's folder, of an installed prefix, of a checkout
_INTERPRETERS = ("bin/python", "bin/python3", "Scripts/python.exe")
_BUILD_HINT = "cmake -B build -DBUILD_SHARED_LIBS=ON && cmake --build build; the libraries are then in build/bin"

_ELF_MACHINES = {3: "x86", 40: "ARM", 62: "x86-64", 183: "AArch64", 243: "RISC-V", 21: "PowerPC64", 258: "LoongArch"}
_THIS_MACHINE = {"x86_64": 62, "amd64": 62, "aarch64": 183, "arm64": 183, "riscv64": 243, "ppc64le": 21, "i686": 3}


def find_engine(text: str | os.PathLike[str]) -> EngineSettings:
    """The engine that a word of the command line names; settings of a build or interpreter are llama.cpp's defaults.

    In this order: a name under configs/engines, a YAML file, a folder with libllama (also in its `bin`, `lib` or
    `build/bin`), a virtual environment's folder, an executable. Its `name` is the word itself.
    Raises SettingsError for what is none of them, EngineError for libraries of another processor.
    """
    word = str(text)
    path = Path(word).expanduser()
    if word in engine_names() or path.suffix in (".yaml", ".yml"):
        return load_engine(word)
    absolute = Path(os.path.abspath(path))  # not resolve(): only a virtual environment's link knows its packages
    if path.is_dir():
        return _in_folder(absolute, word)
    if not path.exists():
        if path.name == word:
            return load_engine(word)  # says which names there are
        raise SettingsError(f"--engine {word}: there is no such file or folder", hint=_expected())
    if path.name.startswith("libllama.") or path.name == "llama.dll":
        return _in_folder(absolute.parent, word)
    if not os.access(path, os.X_OK):
        raise SettingsError(f"--engine {word} is neither YAML nor executable", hint=_expected())
    return EngineSettings(name=word, python=absolute)


def _expected() -> str:
    example = configs_dir() / "engines" / "example.yaml"
    return (
        f"expected a name ({', '.join(engine_names())}), a YAML file (as {example}), a folder with libllama.so, "
        "or a Python with llama-cpp-python"
    )


def _in_folder(folder: Path, word: str) -> EngineSettings:
    """The engine of the libraries or of the interpreter that are in a folder."""
    for place in _PLACES:
        for name in _LIBRARIES:
            library = folder / place / name
            if library.exists():
                _check_processor(library)
                return EngineSettings(name=word, lib_dir=library.parent)
    for name in _INTERPRETERS:
        if os.access(folder / name, os.X_OK):
            return EngineSettings(name=word, python=folder / name)
    static = [file for place in (*_PLACES, "src", "build/src") if (file := folder / place / "libllama.a").exists()]
    if static:
        raise SettingsError(
            f"--engine {word}: {static[0]} is a static library, a shared one is needed", hint=_BUILD_HINT
        )
    library_name = _LIBRARIES[1] if sys.platform == "darwin" else _LIBRARIES[0]
    raise SettingsError(
        f"--engine {word}: no {library_name} in it, nor in its bin, lib or build/bin, and no bin/python",
        hint=_BUILD_HINT,
    )


def _check_processor(library: Path) -> None:
    """EngineError if an ELF library is for another processor: the loader would say that there is no such file."""
    try:
        with library.open("rb") as file:
            head = file.read(20)
    except OSError as error:
        raise SettingsError(f"cannot read {library}: {error.strerror}", hint="check the path") from error
    ours = _THIS_MACHINE.get(platform.machine().lower())
    if len(head) < 20 or head[:4] != b"\x7fELF":
        if sys.platform == "linux":
            raise EngineError(f"{library} is no library of this system", hint="build llama.cpp on this machine")
        return
    machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    if ours is not None and machine != ours:
        theirs = _ELF_MACHINES.get(machine, f"processor {machine}")
        raise EngineError(
            f"{library} is built for {theirs}, and this machine is {_ELF_MACHINES[ours]}",
            hint="build llama.cpp on this machine",
        )
