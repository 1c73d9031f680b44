"""Interpreters whose worker is patched: a wrapper script that starts this very one with a sitecustomize."""

from __future__ import annotations

import sys
from pathlib import Path

_HOOK = """

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


def patched_python(folder: Path, module: str, code: str) -> Path:
    """A script to give as `EngineSettings.python`; `code` has a function `patch`, called with the imported `module`."""
    folder.mkdir(parents=True, exist_ok=True)
    imports, finder = "import importlib.abc, importlib.machinery, sys\n", _HOOK.format(module=module)
    (folder / "sitecustomize.py").write_text(imports + code + finder)
    script = folder / "python"
    script.write_text(f"#!/bin/sh\nPYTHONPATH='{folder}' exec '{sys.executable}' \"$@\"\n")
    script.chmod(0o755)
    return script
