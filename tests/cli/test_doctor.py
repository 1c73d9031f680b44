"""`doctor`: what it reports, and that it says what is missing."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
from typer.testing import CliRunner

from diffharness.cli import doctor
from diffharness.cli.main import app
from diffharness.machine import Machine, free_disk, this_machine, usable_cores


def machine(*flags: str) -> Machine:
    return Machine("a processor", flags, 2, 8_000_000_000, "Linux", "3.11.0")


def test_this_machine() -> None:
    here = this_machine()
    assert here.cpu and here.system and here.python
    assert here.cores == usable_cores() >= 1
    assert here.memory_bytes > 100_000_000


def test_free_disk_of_a_place_to_be(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert free_disk(tmp_path / "not" / "yet") > 0


def test_ready_here() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "-"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert report["machine"]["cores"] >= 1
    assert report["engine"]
    found = {check["what"]: check["found"] for check in report["checks"]}
    assert found["torch"] == importlib.metadata.version("torch")
    assert {"llama-cpp-python", "engine", "disk"} <= found.keys()


def test_the_table_says_ready() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.stdout.rstrip().endswith("ready")


def test_what_is_missing_or_old_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: ["numpy>=999", "no-such-package-of-ours>=1", "rich>=1"])
    checks = {check.what: check for check in doctor.package_checks()}
    assert not checks["numpy"].ok and ">=999" in checks["numpy"].found
    assert checks["no-such-package-of-ours"].found == "not installed"
    assert "pip install 'no-such-package-of-ours>=1'" in (checks["no-such-package-of-ours"].fix or "")
    assert checks["rich"].ok
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "pip install 'numpy>=999'" in result.stdout
    assert "not ready" in result.stdout


def test_an_engine_that_does_not_load_is_missing(tmp_path) -> None:  # type: ignore[no-untyped-def]
    settings = tmp_path / "engine.yaml"
    settings.write_text(f"lib_dir: {tmp_path}\n")
    result = CliRunner().invoke(app, ["doctor", "--engine", str(settings), "--json", "-"])
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    assert report["engine"] is None
    assert [check["what"] for check in report["checks"] if check["essential"] and not check["ok"]] == ["engine"]


def test_amx_is_told_but_keeps_nothing_from_running() -> None:
    checks = {check.what: check for check in doctor.machine_checks(machine("avx2", "amx_int8"))}
    assert not checks["AMX"].ok and not checks["AMX"].essential
    assert "ggml_backend_amx_mul_mat" in checks["AMX"].found
    assert {check.what: check.ok for check in doctor.machine_checks(machine("avx2"))}["AMX"]
