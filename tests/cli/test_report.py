"""`diffharness report`: what was saved is rendered again, in every form, and is what the command itself printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffharness.cli.main import app
from diffharness.records import Leg, RunRecord, Subject, Verdict
from diffharness.records.bisect import BisectRecord, StepRow
from diffharness.records.gate import GateRecord
from diffharness.records.matrix import MatrixBase, MatrixRecord
from diffharness.records.subject import ArtifactSubject
from diffharness.report import html, markdown, terminal
from diffharness.report import json as as_json
from diffharness.report.saved import _names
from tests.report.conftest import hostile as hostile  # fixtures that this file shares
from tests.report.conftest import plain as plain


def report(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_a_run_folder_in_every_form(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    record: RunRecord = request.getfixturevalue(name)
    (tmp_path / "run.json").write_text(record.to_json())
    forms = {
        "text": terminal.to_text, "md": markdown.to_markdown, "json": as_json.to_json, "html": html.to_html,
    }  # fmt: skip
    for form, render in forms.items():
        code, output, _ = report(tmp_path, "--format", form)
        assert code == 0 and output.strip() == render(record).strip(), form
    assert report(tmp_path)[1] == report(tmp_path / "run.json", "--format", "text")[1]


def test_the_folders_of_other_commands(tmp_path: Path) -> None:
    record = MatrixRecord(
        verdict=Verdict(primary="inconclusive", all=["inconclusive"], summary="the engine cannot be used."),
        leg=Leg(),
        base=MatrixBase(settings={}),
        subject=Subject(artifact=ArtifactSubject(path="m.gguf")),
    )
    (tmp_path / "matrix.json").write_text(record.to_json())
    code, output, _ = report(tmp_path)
    assert code == 0 and "none was run" in output and "NMSE from the base" not in output


def test_into_a_file(tmp_path: Path, plain: RunRecord) -> None:
    (tmp_path / "r.json").write_text(plain.to_json())
    code, output, _ = report(tmp_path / "r.json", "--format", "html", "--output", tmp_path / "page.html")
    assert code == 0 and output == "" and (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_records_of_other_commands(tmp_path: Path) -> None:
    steps = [StepRow(index=0, engine="a", state="first"), StepRow(index=1, engine="b", state="changed", reason="x")]
    record = BisectRecord(
        outcome="changed", summary="first changed: b.", engines=["a", "b"], on="either", floor=1e-6, steps=steps,
        artifact=ArtifactSubject(path="m.gguf"),
    )  # fmt: skip
    (tmp_path / "b.json").write_text(record.to_json())
    code, output, _ = report(tmp_path / "b.json", "--format", "md")
    assert code == 0 and output.startswith("### diffharness bisect: fail")
    assert json.loads(report(tmp_path / "b.json", "--format", "json")[1]) == json.loads(record.to_json())
    code, _, errors = report(tmp_path / "b.json", "--format", "html")
    assert code == 2 and "expected md, json or text as the format of bisect" in errors


def test_every_record_has_a_report() -> None:
    assert {"run", "grade", "inspect", "gate", "restore", "recipe", "bisect", "compare"} <= set(_names().values())
    assert _names()[GateRecord.model_fields["schema_"].default] == "gate"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema": "diffharness.run/99"}', "found schema 'diffharness.run/99'"),
        ('{"schema": "diffharness.run/1"}', "not a valid diffharness.run/1 record"),
        ('{"schema": ["x"]}', "found none"),
        ("[]", "found none"),
        ("[" * 100000, "found none"),
        ("\x00", "found none"),
    ],
)
def test_what_is_no_record_is_exit_2(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "run.json").write_text(text)
    code, _, errors = report(tmp_path)
    assert code == 2 and says in errors


def test_what_is_not_there_is_exit_2(tmp_path: Path) -> None:
    assert "expected a run folder" in report(tmp_path)[2]
    code, _, errors = report(tmp_path / "absent.json")
    assert code == 2 and "cannot read the record" in errors
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    assert report(tmp_path / "x.json")[0] == 2
