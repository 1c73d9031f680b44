"""`diffharness grade` as a user calls it: exit codes and where results go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from diffharness.cli.main import app
from tests.e2e.issue_6056 import CHECKPOINT, CLEAN, HELDOUT, damage

FEW = ["--fixture", str(HELDOUT), "--tokens", "200", "--chunk", "100", "--no-engine", "--threads", "1", "-q"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage(tmp_path_factory.mktemp("6056") / "damaged.gguf")


def grade(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["grade", *map(str, arguments), *FEW])
    return result.exit_code, result.output


def test_the_table_and_exit_0(damaged: Path) -> None:
    code, output = grade(CLEAN, damaged, "--checkpoint", CHECKPOINT)
    assert code == 0, output  # without a control it measures, and judges nothing
    assert "2 artifacts graded." in output and "Reproduce: diffharness grade" in output


def test_loss_beyond_the_control_is_exit_1(damaged: Path, tmp_path: Path) -> None:
    code, output = grade(damaged, "--checkpoint", CHECKPOINT, "--control", "--out", tmp_path / "run")
    assert code == 1 and "fail" in output
    kept = json.loads((tmp_path / "run" / "grade.json").read_text())
    assert kept["schema"] == "diffharness.grade/1" and kept["rows"][0]["control"]["beyond"] is True
    assert (tmp_path / "run" / "grade.md").read_text().startswith("### diffharness grade: fail")


def test_one_unreadable_artifact_is_exit_2_and_the_others_are_graded(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(CLEAN.read_bytes()[:4000])
    code, output = grade(broken, CLEAN, "--json", "-")
    assert code == 2
    rows = json.loads(output)["rows"]
    assert rows[0]["error"] and rows[0]["ppl"] is None and rows[1]["ppl"]["value"] > 1


def test_unfit_input_is_exit_2(tmp_path: Path) -> None:
    assert grade(tmp_path / "none.gguf")[0] == 2
    assert grade(CLEAN, "--checkpoint", tmp_path, "--out", tmp_path / "run")[0] == 2
    assert not (tmp_path / "run").exists()
    assert grade(CLEAN, "--checkpoint", tmp_path)[0] == 2
    assert grade(CLEAN, "--checkpoint", CHECKPOINT, "--against", CLEAN)[0] == 2
    assert grade()[0] == 2


def test_markdown(tmp_path: Path) -> None:
    code, _ = grade(CLEAN, "--against", CLEAN, "--full", "--markdown", tmp_path / "g.md")
    assert code == 0
    shown = (tmp_path / "g.md").read_text()
    assert "Same top p, % | 100.000" in shown.replace("\\", "")


def test_products_in_bfloat16_are_an_option_of_grade_alone() -> None:
    code, output = grade(CLEAN, "--against", CLEAN, "--matmul", "bf16")
    assert code == 0 and "Noise of --matmul bf16" in output and "Within the noise: mean KL of" in output
    assert grade(CLEAN, "--matmul", "bf16", "--dtype", "float64")[0] == 2
    assert grade(CLEAN, "--matmul", "fp8")[0] == 2
    assert "--matmul" not in grade(CLEAN)[1]


@pytest.mark.parametrize("command", sorted(command.name or "" for command in app.registered_commands))
def test_no_other_command_has_it(command: str) -> None:
    found = "--matmul" in {name for one in _options(command) for name in one}
    assert found == (command == "grade")
    if command != "grade":
        result = CliRunner().invoke(app, [command, "--matmul", "bf16"])
        assert result.exit_code == 2 and "No such option" in result.output


def _options(command: str) -> list[list[str]]:
    made: Any = typer.main.get_command(app)
    return [parameter.opts for parameter in made.commands[command].params]
