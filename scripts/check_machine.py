"""Checks what the set-up needs from the machine before anything is downloaded.

Prints one line for each thing that is missing, with how to get it, and exits 1; prints nothing and
exits 0 where all is there. Runs under any Python 3 and needs nothing but the standard library.
"""

import os
import platform
import shutil
import subprocess
import sys

NEEDED_PYTHON = (3, 11)
NEEDED_DISK_GB = 6  # torch, llama.cpp and its build tree; several more where torch brings CUDA along


def has_module(name):
    """Whether this interpreter can import `name`."""
    return subprocess.call([sys.executable, "-c", "import " + name], stderr=subprocess.DEVNULL) == 0


def missing_python():
    if sys.version_info < NEEDED_PYTHON:
        yield (
            "Python {}.{} or newer is needed, {} is {}: install a newer one and say which with "
            "`make PYTHON=python3.12 ...`".format(*NEEDED_PYTHON, sys.executable, platform.python_version())
        )
    elif not (has_module("venv") and has_module("ensurepip")):
        yield (
            "Python's venv module is missing: `apt-get install python3-venv` (Debian, Ubuntu), or a Python "
            "from python.org, pyenv or uv, which have it"
        )


def missing_compiler():
    cxx, cc = os.environ.get("CXX"), os.environ.get("CC")
    has_cxx = any(shutil.which(name) for name in ([cxx] if cxx else ["c++", "g++", "clang++"]))
    has_cc = any(shutil.which(name) for name in ([cc] if cc else ["cc", "gcc", "clang"]))
    if not (has_cxx and has_cc):
        yield (
            "a C and a C++ compiler are missing (llama-cpp-python is built from source): `apt-get install "
            "build-essential` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora), `xcode-select --install` (macOS)"
        )


def missing_disk():
    free_gb = shutil.disk_usage(".").free / 1e9
    if free_gb < NEEDED_DISK_GB and not os.path.exists(".venv"):
        yield f"{NEEDED_DISK_GB} GB of free disk are needed here for .venv, {free_gb:.1f} GB are free: make room"


def main():
    problems = [*missing_python(), *missing_compiler(), *missing_disk()]
    for problem in problems:
        print("error: " + problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
