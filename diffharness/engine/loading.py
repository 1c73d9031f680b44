"""The very libraries of an engine: the bindings' low-level module, and the ggml that their libllama uses.

An engine that cannot be loaded is an EngineError that says what is missing, and where to get it.
Standard library and llama_cpp only.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffharness.engine.abi import HINT, check_structures
from diffharness.engine.bindings import HINT as NOT_TOGETHER
from diffharness.engine.bindings import Ggml
from diffharness.errors import EngineError


def load_llama() -> Any:
    """The module `llama_cpp.llama_cpp`, without the rest of its package (chat formats, servers, loggers).

    Raises EngineError if there are no bindings, if the library cannot be loaded, or if its structures are not
    those that the bindings declare.
    """
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.submodule_search_locations is None:
            fix = f"{sys.executable} -m pip install llama-cpp-python"
            raise EngineError(f"{sys.executable} has no llama_cpp", hint=fix)
        bare = types.ModuleType("llama_cpp")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["llama_cpp"] = bare
    try:
        llama: Any = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError, AttributeError) as err:
        raise _not_loaded(err) from err
    missing = [name for name in _CALLED if not hasattr(llama, name)]
    if missing:
        raise EngineError(
            f"the llama_cpp of {sys.executable} has no {missing[0]}",
            hint="llama-cpp-python 0.3.8 is the oldest that fits",
        )
    check_structures(llama)
    return llama


# What the worker calls whatever its job; llama-cpp-python has all of it since 0.3.8.
_CALLED = (
    "llama_model_load_from_file", "llama_model_free", "llama_init_from_model", "llama_model_get_vocab",
    "llama_vocab_n_tokens", "llama_model_meta_val_str", "llama_batch_init", "llama_decode", "llama_get_logits",
)  # fmt: skip

# What the loader's words mean: (pattern, meaning, hint).
_LOADING = (
    (
        r"undefined symbol: (?P<what>\w+)",
        "the library has no {what}, which these bindings call: it is another version",
        HINT,
    ),
    (r"[Ss]ymbol not found: _?(?P<what>\w+)", "the library has no {what}, which these bindings call", HINT),
    (r"No module named '(?P<what>[\w.]+)'", "{python} has no {what}", "{python} -m pip install {what}"),
    (
        r"wrong ELF class|invalid ELF header|file too short|incompatible architecture|not a mach-o",
        "the library is not for this processor and system, or not whole",
        "build llama.cpp on this machine",
    ),
    (
        r"version `(?P<what>[\w.]+)' not found",
        "the library needs {what} of the system",
        "build llama.cpp on this machine",
    ),
    (
        r"(?P<what>[\w.+-]+\.so[\w.]*): cannot open shared object file",
        "the library needs {what}, which is not here",
        "copy all of the build's libraries into its folder, or set LD_LIBRARY_PATH",
    ),
)


def _not_loaded(err: BaseException) -> EngineError:
    """The loader's error in words, with its own behind them."""
    for pattern, meaning, hint in _LOADING:
        found = re.search(pattern, str(err))
        if found:
            words = {"python": sys.executable, **found.groupdict()}
            return EngineError(f"llama_cpp does not load: {meaning.format(**words)} ({err})", hint=hint.format(**words))
    return EngineError(f"llama_cpp does not load: {err}", hint=NOT_TOGETHER)


def loaded_libraries(stem: str) -> list[Path]:
    """Files of this name that are mapped into this process (Linux; empty elsewhere)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = (line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "/" in line)
    return [Path(path) for path in dict.fromkeys(paths) if Path(path).name.startswith(stem)]


def load_ggml(llama: Any) -> Ggml:
    """The libggml-base that libllama itself uses; a second copy would have its own state."""
    beside = Path(llama._lib._name).parent
    names = ("libggml-base.so.0", "libggml-base.0.dylib", "libggml-base.dylib")
    return Ggml(_open(loaded_libraries("libggml-base") or [beside / name for name in names], "libggml-base"))


def devices(llama: Any) -> list[str]:
    """Names and descriptions of the devices that the engine sees."""
    found = loaded_libraries("libggml.")
    if not found:
        return []
    registry: Any = _open(found, "libggml")
    registry.ggml_backend_dev_get.restype, registry.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    registry.ggml_backend_dev_count.restype = ctypes.c_size_t
    base: Any = _open(loaded_libraries("libggml-base"), "libggml-base")
    for function in (base.ggml_backend_dev_name, base.ggml_backend_dev_description):
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    handles = [registry.ggml_backend_dev_get(i) for i in range(registry.ggml_backend_dev_count())]
    ask = (base.ggml_backend_dev_name, base.ggml_backend_dev_description)
    return [": ".join(function(handle).decode() for function in ask) for handle in handles]


def _open(paths: Iterable[Path], what: str) -> ctypes.CDLL:
    for path in paths:
        if path.exists():
            return ctypes.CDLL(str(path))
    raise EngineError(f"no {what} beside libllama", hint=NOT_TOGETHER)
