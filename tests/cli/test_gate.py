"""`diffharness gate` as a CI system calls it: exit codes, files, annotations."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffharness import damage
from diffharness.cli.main import app
from diffharness.settings import data_dir

EMBEDDED = data_dir("fixtures") / "tiny-gemma4"
ARTIFACT = EMBEDDED / "tiny-gemma4-Q4_K_M.gguf"
COMMON = ["--checkpoint", str(EMBEDDED / "checkpoint"), "--threads", "1", "-q"]


@pytest.fixture
def quick(tmp_path: Path) -> str:
    """A gate without forwards."""
    path = tmp_path / "quick.yaml"
    path.write_text("rules: {finite: {at_most: 0}, metadata: {at_most: 0}, damage: {at_most: 0}}\n")
    return str(path)


def test_the_embedded_model_passes() -> None:
    result = CliRunner().invoke(app, ["gate", "--tokens", "512", "--threads", "1", "-q"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("pass\n") and "perplexity (4 bits and up)" in result.stdout


def test_every_output_at_once(tmp_path: Path, quick: str) -> None:
    files = {kind: tmp_path / f"gate.{kind}" for kind in ("json", "markdown", "junit")}
    args = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    result = CliRunner().invoke(app, ["gate", str(ARTIFACT), *COMMON, "--gate", quick, *args, "--github"])
    assert result.exit_code == 0, result.output
    assert json.loads(files["json"].read_text())["schema"] == "diffharness.gate/1"
    assert "### diffharness gate: pass" in files["markdown"].read_text()
    assert ET.parse(files["junit"]).getroot().get("tests") == "3"
    assert result.stdout.splitlines()[-1].startswith("::notice title=gate%3A pass::")


def test_damage_exits_with_1_and_annotates(tmp_path: Path, quick: str) -> None:
    out = tmp_path / "damaged.gguf"
    damage.apply(ARTIFACT, out, [], set_keys=["gemma4.rope.freq_base_swa=float:1000000"])
    args = ["gate", str(out), *COMMON, "--gate", quick, "--github", "--json", "-"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1, result.output
    assert json.loads(result.stdout)["outcome"] == "fail", "standard output holds the record and nothing else"
    assert "::error title=gate%3A metadata::1, limit <= 0: " in result.stderr
    assert "gemma4.rope.freq_base_swa" in result.stderr


def test_what_was_not_run_exits_with_125(tmp_path: Path) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text("rules: {kl: {at_most: {8: 0.1}}}\n")
    result = CliRunner().invoke(app, ["gate", str(ARTIFACT), *COMMON, "--tokens", "64", "--gate", str(gate)])
    assert result.exit_code == 125, result.output
    assert result.stdout.startswith("verdict: inconclusive") and "no limit for 4.73 bits" in result.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([str(ARTIFACT)], "expected the checkpoint to judge MODEL by"),
        ([str(ARTIFACT), *COMMON, "--gate", "none.yaml"], "none.yaml"),
        ([str(ARTIFACT), *COMMON, "--junit", "-"], "expected a file for --junit"),
        ([str(ARTIFACT), *COMMON, "--junit", "no/such/folder/x.xml"], "cannot write"),
        ([str(ARTIFACT), *COMMON, "--fixture", "nowhere"], "no fixture 'nowhere'"),
        (["none.gguf", *COMMON], "no such file"),
    ],
)
def test_unfit_input_is_2(args: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["gate", *args])
    assert result.exit_code == 2 and says in result.stderr, result.output
