"""`diffharness inspect` as it is typed: streams, files and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffharness.cli._progress import progress_bar
from diffharness.cli.main import app
from tests.e2e.issue_6056 import CHECKPOINT, CLEAN

COMMAND = ["inspect", str(CLEAN), "--checkpoint", str(CHECKPOINT), "--threads", "1"]


def test_a_clean_file_with_its_record_and_report(tmp_path: Path) -> None:
    record, report = tmp_path / "r.json", tmp_path / "r.md"
    result = CliRunner().invoke(app, [*COMMAND, "-q", "--json", str(record), "--markdown", str(report)])
    assert result.exit_code == 0, result.output
    assert "verdict: agree" in result.stdout and not result.stderr
    found = json.loads(record.read_text())
    assert found["schema"] == "diffharness.inspect/1" and found["totals"]["drifted"] == 0
    assert report.read_text().startswith("### diffharness inspect: agree")


def test_unfit_input(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["inspect", str(CLEAN)]).exit_code == 2
    missing = runner.invoke(app, ["inspect", str(CLEAN), "--checkpoint", str(tmp_path / "none")])
    assert missing.exit_code == 2 and "expected a folder" in missing.stderr
    (tmp_path / "short.gguf").write_bytes(CLEAN.read_bytes()[:5000])
    short = runner.invoke(app, ["inspect", str(tmp_path / "short.gguf"), "--checkpoint", str(CHECKPOINT)])
    assert short.exit_code == 2 and "error:" in short.stderr


def test_the_bar_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with progress_bar("tensors", quiet=quiet) as watch:
            watch(5, 10)
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "")
