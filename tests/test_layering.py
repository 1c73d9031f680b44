"""Imports point down only, and the two sides of a comparison never see each other.

That the reference knows nothing of llama.cpp, and the engine nothing of the reference, is the
product's claim; so it is read off the source, with every import of every module, those inside
functions and under TYPE_CHECKING included.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = "diffharness"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# The layer of each part, by its first name below the package. A part that is not here fails the test.
LAYERS: dict[str, int] = {
    "__init__": 0, "errors": 0, "taps": 0, "records": 0, "layers": 0, "words": 0, "allocator": 0,
    "weights": 1, "fixture": 1, "tokenizer": 1, "token_difference": 1, "settings": 1,
    "metrics": 1, "row_sums": 1, "captures": 1, "recorded": 1, "machine": 1, "kld": 1, "paired": 1, "builds": 1,
    "bisection": 1,
    "reference": 2, "engine": 2, "replay": 2,
    "legs": 3, "report": 3, "verdict": 3, "forensics": 3, "damage": 3,
    "pipeline": 4,
    "cli": 5, "__main__": 5,
}  # fmt: skip

# Parts of one layer that never import one another.
APART = {frozenset({"reference", "engine"}), frozenset({"replay", "engine"})}

# Packages from outside that a part must not reach, neither itself nor through what it imports.
UNREACHABLE: dict[str, frozenset[str]] = {
    "reference": frozenset({"llama_cpp", "transformers"}),
    "replay": frozenset({"llama_cpp", "transformers"}),
    "engine": frozenset({"torch", "transformers"}),
    "weights": frozenset({"llama_cpp", "torch", "transformers"}),
    "fixture": frozenset({"llama_cpp", "torch", "transformers"}),
    "metrics": frozenset({"llama_cpp", "torch", "transformers"}),
}

# What runs inside the engine worker, under interpreters that have only numpy and llama_cpp.
WORKER = frozenset({
    "__init__", "errors", "taps", "captures",
    "engine", "engine.worker", "engine.session", "engine.capture", "engine.bindings", "engine.nodes", "engine.abi",
    "engine.quantize_jobs", "engine.recording", "engine.decoding", "engine.loading",
    "engine.exercise", "engine.player", "engine.kv_rounding",
})  # fmt: skip
WORKER_OUTSIDE = frozenset({"numpy", "llama_cpp"})

Imports = dict[str, set[str]]  # module below the package ("engine.worker") -> absolute names imported


def module_name(path: Path, root: Path) -> str:
    """`engine.worker` for ROOT/engine/worker.py, `engine` for its __init__, `__init__` for the package's own."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of everything that a module imports, `from x import y` as both `x` and `x.y`."""
    here = [PACKAGE, *([] if module == "__init__" else module.split("."))]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = here[: len(here) - node.level + is_package]
                base = ".".join([*up, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def read_imports(root: Path) -> Imports:
    return {
        module_name(path, root): set(imported(path.read_text(), module_name(path, root), path.name == "__init__.py"))
        for path in sorted(root.rglob("*.py"))
        if "_data" not in path.relative_to(root).parts
    }


def own(name: str, modules: Imports) -> str | None:
    """The module of ours that an absolute name stands for; None for a name from outside or of an attribute."""
    if name == PACKAGE:
        return "__init__"
    below = name.removeprefix(PACKAGE + ".")
    return below if name.startswith(PACKAGE + ".") and below in modules else None


def part(module: str) -> str:
    return module.split(".")[0]


def upward_imports(modules: Imports) -> list[str]:
    """Every import of a higher layer, and every import between parts that are kept apart."""
    found = []
    for module, names in modules.items():
        if part(module) not in LAYERS:
            found.append(f"{module}: `{part(module)}` has no layer in this test's table")
            continue
        for name in names:
            target = own(name, modules)
            if target is None or part(target) not in LAYERS:
                continue
            if LAYERS[part(target)] > LAYERS[part(module)]:
                found.append(f"{module} imports {target}, which is above it")
            elif frozenset({part(module), part(target)}) in APART:
                found.append(f"{module} imports {target}: these two never see each other")
    return found


def reach(module: str, modules: Imports) -> dict[str, list[str]]:
    """Every module of ours that importing `module` runs, with the way there."""
    ways, todo = {module: [module]}, [module]
    while todo:
        at = todo.pop()
        for name in modules[at]:
            target = own(name, modules)
            if target is not None and target not in ways:
                ways[target] = [*ways[at], target]
                todo.append(target)
    return ways


def outside(module: str, modules: Imports) -> set[str]:
    """Top-level packages from outside that a module imports itself."""
    tops = {name.split(".")[0] for name in modules[module]}
    return tops - {PACKAGE, "__future__", ""} - set(sys.stdlib_module_names)


def forbidden_packages(modules: Imports) -> list[str]:
    """Every way from a part to a package that it must not reach."""
    return [
        f"{' -> '.join(way)} imports {name}"
        for module in modules
        for way in reach(module, modules).values()
        for name in outside(way[-1], modules) & UNREACHABLE.get(part(module), frozenset())
    ]


def worker_leaks(modules: Imports) -> list[str]:
    """Every import of a worker-side module that another interpreter may not have."""
    found = []
    for module in sorted(WORKER & modules.keys()):
        found += [f"{module} imports {name}" for name in outside(module, modules) - WORKER_OUTSIDE]
        for name in modules[module]:
            target = own(name, modules)
            if target is not None and target not in WORKER:
                found.append(f"{module} imports {target}, which is not the worker's")
    return found


@pytest.fixture(scope="module")
def modules() -> Imports:
    found = read_imports(ROOT)
    assert len(found) > 10, f"expected the package's modules under {ROOT}, found {sorted(found)}"
    return found


def test_imports_point_down(modules: Imports) -> None:
    assert upward_imports(modules) == []


def test_the_two_sides_reach_only_what_they_may(modules: Imports) -> None:
    assert forbidden_packages(modules) == []


def test_the_worker_needs_only_numpy_and_llama_cpp(modules: Imports) -> None:
    assert worker_leaks(modules) == []


# ---- the test's own test: each planted import is caught

PLANTS = [
    ("errors.py", "import diffharness.fixture", upward_imports, "errors imports fixture, which is above it"),
    ("reference/ops.py", "from diffharness.engine import runner", upward_imports, "never see each other"),
    ("engine/runner.py", "from ..reference import ops", upward_imports, "never see each other"),
    ("legs/graph.py", "from diffharness import pipeline", upward_imports, "legs.graph imports pipeline"),
    ("surprise.py", "", upward_imports, "`surprise` has no layer"),
    ("reference/ops.py", "def f():\n    import llama_cpp.x", forbidden_packages, "ops imports llama_cpp"),
    ("engine/runner.py", "from torch import Tensor", forbidden_packages, "engine.runner imports torch"),
    ("metrics.py", "import torch", forbidden_packages, "engine.runner -> metrics imports torch"),
    ("engine/worker.py", "import yaml", worker_leaks, "engine.worker imports yaml"),
    ("captures.py", "from diffharness.metrics import nmse", worker_leaks, "captures imports metrics"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "code", "check", "message"), PLANTS, ids=[f"{p[0]}-{p[3]}" for p in PLANTS])
def test_a_planted_import_is_caught(
    tmp_path: Path, file: str, code: str, check: Callable[[Imports], list[str]], message: str
) -> None:
    clean = {
        "__init__.py": "", "errors.py": "import json", "captures.py": "import numpy as np\nfrom .errors import E",
        "metrics.py": "import numpy", "fixture.py": "from diffharness.errors import E", "pipeline.py": "",
        "reference/__init__.py": "", "reference/ops.py": "import torch",
        "engine/__init__.py": "", "engine/runner.py": "from diffharness.metrics import nmse",
        "engine/worker.py": "import llama_cpp\nfrom diffharness import captures",
        "legs/__init__.py": "", "legs/graph.py": "from diffharness.reference import ops",
    }  # fmt: skip
    root = tmp_path / PACKAGE
    for name, text in clean.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert check(read_imports(root)) == []
    (root / file).write_text(code)
    assert any(message in line for line in check(read_imports(root))), check(read_imports(root))
