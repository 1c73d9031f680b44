"""Builds of llama.cpp with one patch each, from the source package of the pinned bindings.

The source is built once; each fault then takes the compilation of one file. Everything lies in `.cache/engine-faults`
and is kept: a build that is there is not made again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.converter.source import llama_cpp_source
from tests.faults.patches import Patch

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "engine-faults"
SOURCE, BUILD = CACHE / "llama.cpp", CACHE / "build"
_OFF = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")


def clean_build() -> Path:
    """The folder with the libraries of the source as it is."""
    _prepare()
    return _kept("clean")


def faulty_build(patch: Patch) -> Path:
    """The folder with the libraries of the source under one patch."""
    _prepare()
    folder = CACHE / "builds" / patch.name
    stamp, changed = folder / "patch.txt", f"{patch}\n"
    if stamp.is_file() and stamp.read_text() == changed:
        return folder
    path = SOURCE / patch.file
    before = path.read_bytes()
    try:
        path.write_text(patch.apply(SOURCE))
        _make()
        _keep(patch.name)
    finally:
        path.write_bytes(before)
    stamp.write_text(changed)
    return folder


def _kept(name: str) -> Path:
    folder = CACHE / "builds" / name
    if not (folder / "libllama.so").exists():
        _make()
        _keep(name)
    return folder


def _keep(name: str) -> None:
    """Copy the libraries, under the one name by which they load each other."""
    folder = CACHE / "builds" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for library in (BUILD / "bin").glob("*.so*"):
        shutil.copy(library, folder / library.name, follow_symlinks=False)


def _prepare() -> None:
    if not SOURCE.is_dir():
        part = SOURCE.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(llama_cpp_source(), part)
        part.rename(SOURCE)
    if not (BUILD / "CMakeCache.txt").is_file():
        options = [f"-DLLAMA_BUILD_{part}=OFF" for part in _OFF]
        _run("cmake", "-S", SOURCE, "-B", BUILD, "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", *options)


def _make() -> None:
    _run("cmake", "--build", BUILD, "--target", "llama", "--parallel", str(os.cpu_count() or 1))


def _run(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise SystemExit(f"{command[0]} {command[1]} ... ended with {done.returncode}:\n{tail}")
