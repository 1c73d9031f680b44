"""llama.cpp's own generator of random models, built from the source package of the installed bindings, and its models.

Building takes about 12 minutes of one core. All of it lies in `.cache/zoo`, by version, and is made once.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.converter.source import llama_cpp_source

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "zoo"
GENERATOR = "test-llama-archs"
SEED = "1"
_OPTIONS = {"LLAMA_BUILD_TESTS": "ON", "LLAMA_BUILD_TOOLS": "OFF", "LLAMA_BUILD_EXAMPLES": "OFF"}


def zoo(seed: str = SEED, deviation: str | None = None) -> list[Path]:
    """Every model that the generator writes, sorted by name; they are made if they are not there.

    `deviation` is that of the weights, by default the generator's own.
    """
    name = "models" if (seed, deviation) == (SEED, None) else f"models-{seed}-{deviation or 'own'}"
    models = _folder() / name
    if not models.is_dir():
        part = models.with_name(name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _run(generator(), "-s", seed, *(("-d", deviation) if deviation else ()), "-o", part)
        part.rename(models)
    return sorted(models.glob("*.gguf"))


def generator() -> Path:
    """The generator's binary."""
    build = _folder() / "build"
    binary = build / "bin" / GENERATOR
    if not binary.exists():
        options = [f"-D{name}={value}" for name, value in {"CMAKE_BUILD_TYPE": "Release", **_OPTIONS}.items()]
        _run(_cmake(), "-S", llama_cpp_source(), "-B", build, *options)
        _run(_cmake(), "--build", build, "--target", GENERATOR, "--parallel", str(os.cpu_count() or 1))
    return binary


def _cmake() -> str:
    """CMake, of the system or of this environment."""
    found = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent)
    if found is None:
        raise RuntimeError("cmake is needed to build llama.cpp's generator: pip install cmake")
    return found


def _folder() -> Path:
    return CACHE / importlib.metadata.version("llama-cpp-python")


def _run(*command: str | Path) -> None:
    """The command; RuntimeError with the end of what it said if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{tail}")
