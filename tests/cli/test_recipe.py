"""`diffharness recipe` as it is called: the default, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffharness.cli.main import app
from diffharness.settings import data_dir

EMBEDDED = data_dir("fixtures") / "tiny-gemma4"
CHECKPOINT = str(EMBEDDED / "checkpoint")


def test_the_embedded_ladder_as_json_and_markdown(tmp_path: Path) -> None:
    out, report = tmp_path / "ladder.json", tmp_path / "ladder.md"
    result = CliRunner().invoke(
        app, ["recipe", "--tokens", "64", "--threads", "1", "-q", "--json", str(out), "--markdown", str(report)]
    )
    assert result.exit_code == 0, result.output
    assert "gate-up-asym4" in result.stdout and "Reproduce: diffharness recipe" in result.stdout
    record = json.loads(out.read_text())
    assert record["schema"] == "diffharness.recipe/1" and record["ladder"] == "gemma4" and len(record["rungs"]) == 5
    assert "| gate-up-asym4 |" in report.read_text()


def test_recipes_from_files_and_types_are_written(tmp_path: Path) -> None:
    mine, out = tmp_path / "mine.yaml", tmp_path / "mine.gguf"
    mine.write_text('tensors: {"*ffn*": Q4_0, "*": Q8_0}\n')
    fixture = str(EMBEDDED / "heldout.json")
    common = ["recipe", CHECKPOINT, "--fixture", fixture, "--tokens", "64", "--threads", "1", "-q"]
    result = CliRunner().invoke(app, [*common, "--recipe", str(mine), "--write", str(out)])
    assert result.exit_code == 0, result.output
    assert out.is_file() and "written:" in result.stdout
    result = CliRunner().invoke(app, [*common, "--recipe", "Q8_0", "--write", str(out)])  # in place of the one before
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, [*common, "--recipe", "q8_0", "--recipe", "int4", "--json", "-"])
    assert [rung["name"] for rung in json.loads(result.stdout)["rungs"]] == ["Q8_0", "int4"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--recipe", "int5"], "no recipe is called 'int5'"),
        (["--ladder", "none"], "no ladder is called 'none'"),
        (["--recipe", "int4", "--ladder", "gemma4"], "two recipes are called 'int4'"),
        (["--recipe", "int4", "--write", "x.gguf"], "simulated only"),
        (["--write", "x.gguf"], "expected one recipe to write, found 5"),
        (["--recipe", "Q4_0", "--write", "-"], "expected a file to write the GGUF to"),
        ([CHECKPOINT, "--recipe", "Q4_0", "--write", f"{CHECKPOINT}/x.gguf"], "outside of the checkpoint"),
        (["--recipe", "Q4_0", "--write", "no/such/folder/x.gguf"], "cannot write"),
        (["no-such-folder"], "no-such-folder"),
    ],
)
def test_unfit_input_is_2(args: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["recipe", "-q", *args])
    assert result.exit_code == 2 and says in result.stderr, result.output
    assert not list(tmp_path.iterdir())
