"""llama.cpp as it stands in the source package of the installed bindings; downloaded once into .cache/."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "llama-cpp-python"


def llama_cpp_source() -> Path:
    """The folder of llama.cpp's sources, the very ones that the installed engine was built from."""
    version = importlib.metadata.version("llama-cpp-python")
    folder = CACHE / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-binary", ":all:"),
            *("--dest", str(CACHE), f"llama-cpp-python=={version}"),
        ],
        check=True,
        timeout=600,
    )
    (archive,) = CACHE.glob(f"llama_cpp_python-{version}.tar.gz")
    part = CACHE / f"{version}.part"
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(part, filter="data")
    (part / f"llama_cpp_python-{version}").rename(folder.parents[1])
    part.rmdir()
    archive.unlink()
    return folder
