"""Models that need more memory than there is: refused before anything is evaluated, one row of a table at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from diffharness.cli.main import app
from diffharness.engine.runner import Engine
from diffharness.reference import memory
from diffharness.settings import data_dir

TINY = data_dir("fixtures") / "tiny-gemma4" / "tiny-gemma4-Q4_K_M.gguf"


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(*_: object, **__: object) -> None:
        raise AssertionError("the engine was asked to evaluate")

    monkeypatch.setattr(memory, "available_memory", lambda: 10_000)
    monkeypatch.setattr(Engine, "capture", evaluated)


def invoke(command: str, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [command, "--quiet", *map(str, arguments)])


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("command", ["run", "grade"])
def test_refused_with_the_need_and_the_remedy(command: str, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    result = invoke(command, TINY, "--tokens", "40", "--json", record)
    said = " ".join((result.stderr + result.stdout).split())
    assert result.exit_code == 2, said
    assert "needs at least" in said and "are available" in said and "Traceback" not in said
    assert not record.exists()
