"""`diffharness matrix` as a user calls it: exit codes and where results go."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from diffharness.cli.main import app
from tests.e2e.issue_6056 import CLEAN, HELDOUT

FEW = ["--fixture", str(HELDOUT), "--tokens", "60", "--threads", "1", "-q"]


def matrix(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["matrix", *map(str, arguments), *FEW])
    return result.exit_code, result.output


def test_the_small_grid_agrees(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, output = matrix(CLEAN, "--grid", "small", "--out", out)
    assert code == 0, output
    assert "verdict: agree" in output and "prefill, then decode" in output
    kept = json.loads((out / "matrix.json").read_text())
    assert kept["schema"] == "diffharness.matrix/1" and [cell["status"] for cell in kept["cells"]] == ["ok", "ok"]
    assert sorted(path.name for path in out.iterdir()) == [
        "engine-base.safetensors", "engine-strict.safetensors", "matrix.json", "matrix.md",
    ]  # fmt: skip


def test_a_setting_that_matters_is_exit_1(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "cells:\n  capped: {dimension: d, overrides: ['gemma4.final_logit_softcapping=float:3'], floor: rounding}\n"
    )
    code, output = matrix(CLEAN, "--grid", grid, "--json", "-")
    record = json.loads(output)
    assert code == 1 and record["verdict"]["primary"] == "engine.settings"
    assert record["cells"][0]["first_tap"] == "logits"  # the residuals are the same: the cap comes last


def test_unfit_input_is_exit_2(tmp_path: Path) -> None:
    assert matrix(tmp_path / "none.gguf")[0] == 2
    assert matrix(CLEAN, "--grid", "none")[0] == 2
    assert matrix(CLEAN, "--cells", "none of these")[0] == 2
    assert matrix(CLEAN, "--override-kv", "a")[0] == 2


def test_a_folder_made_for_nothing_goes_again(tmp_path: Path) -> None:
    assert matrix(CLEAN, "--grid", "none", "--out", tmp_path / "run")[0] == 2
    assert not (tmp_path / "run").exists()


def test_nothing_compared_is_exit_125() -> None:
    assert matrix(CLEAN, "--grid", "full", "--cells", "n_ubatch 512")[0] == 125
