"""`diffharness replay` as it is typed: streams, files and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from diffharness.cli.main import app
from tests.engine.conftest import llama_gguf as llama_gguf
from tests.engine.conftest import make_gguf as make_gguf
from tests.engine.planted import planted_python


def test_a_clean_model_with_its_record_and_report(llama_gguf: Path, tmp_path: Path) -> None:
    record, report = tmp_path / "r.json", tmp_path / "r.md"
    command = ["replay", str(llama_gguf), "--tokens", "12", "--single", "1", "--threads", "1", "-q"]
    result = CliRunner().invoke(app, [*command, "--json", str(record), "--markdown", str(report)])
    assert result.exit_code == 0, result.output
    assert "verdict: agree" in result.stdout and not result.stderr
    found = json.loads(record.read_text())
    assert found["schema"] == "diffharness.replay/1" and found["kernel"]["status"] == "pass"
    assert (found["kernel"]["n_batch"], found["kernel"]["n_single"]) == (12, 1)
    assert report.read_text().startswith("### diffharness replay: agree")


def test_a_wrong_kernel_has_exit_code_1(llama_gguf: Path, tmp_path: Path) -> None:
    python = planted_python(tmp_path / "bin", "alter", node="ffn_up-1")
    settings = tmp_path / "bad.yaml"
    settings.write_text(f"python: {python}\nthreads: 1\n")
    result = CliRunner().invoke(app, ["replay", str(llama_gguf), "--tokens", "8", "--engine", str(settings)])
    assert result.exit_code == 1, result.output
    assert "verdict: engine.kernel" in result.stdout and "ffn_up-1" in result.stdout
    assert "looking for settings that cure it" in result.stderr


def test_unfit_input(tmp_path: Path) -> None:
    runner = CliRunner()
    missing = runner.invoke(app, ["replay", str(tmp_path / "none.gguf")])
    assert missing.exit_code == 2 and "error:" in missing.stderr
    (tmp_path / "text.gguf").write_text("no model")
    assert runner.invoke(app, ["replay", str(tmp_path / "text.gguf")]).exit_code == 2
    assert runner.invoke(app, ["replay", "--tokens", "1"]).exit_code == 2
    nowhere = runner.invoke(app, ["replay", "--device", "nowhere"])
    assert nowhere.exit_code == 2 and "expected a device that torch can use" in nowhere.stderr
    many = runner.invoke(app, ["replay", "--tokens", "100000"])
    assert many.exit_code == 2 and "at most 512 tokens" in many.stderr
