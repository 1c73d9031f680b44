"""Engines that cannot be used, or that misbehave: plain words for each, and none is taken for a crash of llama.cpp."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffharness.engine import process
from diffharness.engine.runner import Engine, EngineCrash
from diffharness.settings import EngineSettings

from .stand_in import stand_in


def engine(python: Path, **changes: object) -> Engine:
    return Engine(EngineSettings(threads=1, time_limit_s=60, python=python).changed(**changes))


def refusal(python: Path, **changes: object) -> EngineCrash:
    with pytest.raises(EngineCrash) as caught:
        engine(python, **changes).info()
    assert caught.value.kind == "refused" and caught.value.exit_code == 125
    return caught.value


def script(path: Path, body: str, shebang: str = "#!/bin/sh\n") -> Path:
    path.write_text(shebang + body)
    path.chmod(0o755)
    return path


def isolated(folder: Path, code: str) -> Path:
    """This interpreter, with `code` as its sitecustomize."""
    (folder / "sitecustomize.py").write_text(code)
    return script(folder / "python", f"PYTHONPATH='{folder}' exec '{sys.executable}' \"$@\"\n")


def without(folder: Path, package: str) -> Path:
    """This interpreter, in which `package` is not installed."""
    return isolated(
        folder,
        "import sys, importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        f"m.PathFinder.find_spec = classmethod(lambda c, n, *a: None if n == {package!r} else find(n, *a))\n",
    )


@pytest.mark.parametrize(
    ("package", "fix"), [("numpy", "pip install numpy"), ("llama_cpp", "pip install llama-cpp-python")]
)
def test_an_interpreter_without_a_package(tmp_path: Path, package: str, fix: str) -> None:
    crash = refusal(without(tmp_path, package))
    assert f"has no {package}" in crash.message and crash.hint is not None and fix in crash.hint


def test_a_python_that_is_too_old(tmp_path: Path) -> None:
    crash = refusal(isolated(tmp_path, "import sys\nsys.version_info = (3, 9, 1)\n"))
    assert "Python 3.10 or newer is needed" in crash.message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("exit 0\n", "no interpreter that can run the engine: it ends with exit code 0"),
        ("echo hello\nexit 0\n", "exit code 0"),
        ("echo 'error: invalid argument: -c' >&2\nexit 1\n", "says 'error: invalid argument: -c'"),
    ],
)
def test_an_executable_that_is_no_python(tmp_path: Path, body: str, says: str) -> None:
    assert says in refusal(script(tmp_path / "x", body)).message


def test_what_cannot_be_executed(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert "Permission denied" in refusal(plain).message
    assert "Exec format error" in refusal(script(tmp_path / "junk", "\x00\x01", shebang="")).message
    assert "No such file" in refusal(tmp_path / "absent").message


def test_what_never_begins_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_START_S", 1.0)
    crash = refusal(script(tmp_path / "x", "sleep 1000\n"), time_limit_s=3600)
    assert "it has not begun after 1 s" in crash.message


def test_a_job_that_begins_may_take_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_START_S", 0.1)
    monkeypatch.setattr(process, "read_heartbeat", lambda fd: {"phase": "import"})
    slow = stand_in(tmp_path, "time.sleep(1)")
    assert engine(slow).info()["version"]


def test_an_engine_that_prints_wherever_it_can(tmp_path: Path) -> None:
    noise = "print('x' * 300000); os.write(2, b'y' * 300000); session._events.write('not JSON\\n[1]\\n{}\\n')"
    assert engine(stand_in(tmp_path, noise)).info()["commit"]


def test_an_illegal_instruction_is_told_in_words(tmp_path: Path) -> None:
    dies = stand_in(tmp_path, "session.phase('import'); os.kill(os.getpid(), signal.SIGILL)")
    with pytest.raises(EngineCrash) as caught:
        engine(dies).info()
    assert caught.value.kind == "signal" and caught.value.phase == "import"
    assert (
        "SIGILL, an instruction that this processor does not have, while loading its libraries" in caught.value.message
    )


def library_folder(folder: Path, content: bytes) -> EngineSettings:
    folder.mkdir()
    (folder / "libllama.so").write_bytes(content)
    return EngineSettings(threads=1, time_limit_s=60, lib_dir=folder)


@pytest.mark.skipif(sys.platform != "linux", reason="the loader's words are glibc's")
def test_libraries_that_do_not_load(tmp_path: Path) -> None:
    with pytest.raises(EngineCrash, match="not for this processor and system, or not whole"):
        Engine(library_folder(tmp_path / "text", b"no library" * 20)).info()
    empty = EngineSettings(threads=1, lib_dir=tmp_path)
    with pytest.raises(EngineCrash, match="base name 'llama' not found"):
        Engine(empty).info()


def test_structures_that_do_not_fit_are_refused_before_they_are_used(tmp_path: Path) -> None:
    """As with the libraries of a llama.cpp whose context parameters have one field more."""
    code = """
import ctypes, sys, types, importlib
from diffharness.engine import loading
check = loading.check_structures
def shifted(llama):
    fields = [f for f in llama.llama_context_params._fields_ if f[0] != 'n_seq_max']
    llama.llama_context_params = type('P', (ctypes.Structure,), {'_fields_': fields})
    check(llama)
loading.check_structures = shifted
"""
    crash = refusal(stand_in(tmp_path, code))
    assert "does not fit these bindings: llama_context_params" in crash.message and crash.hint
