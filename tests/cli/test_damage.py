"""`diffharness damage` from outside: the copy, the record, what is said where, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from diffharness.cli.main import app
from diffharness.damage import FAULTS, KEY
from diffharness.records.base import load
from diffharness.records.damage import DamageRecord
from diffharness.settings import data_dir
from diffharness.weights.gguf_file import open_gguf

EMBEDDED = data_dir("fixtures") / "tiny-gemma4"
MODEL = str(EMBEDDED / "tiny-gemma4-Q4_K_M.gguf")


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["damage", *args])


def test_list_has_every_fault() -> None:
    result = call("--list")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in FAULTS) and f"{len(FAULTS)} faults" in result.stdout
    rows = json.loads(call("--list", "--json", "-").stdout)["faults"]
    assert [row["name"] for row in rows] == list(FAULTS)
    assert all(row["what"] and row["shows"] for row in rows)


def unfolded(text: str) -> str:
    """Lines joined: where they break depends on how long the folder's name is."""
    return " ".join(text.split())


def test_a_copy(tmp_path: Path) -> None:
    out, record_file = tmp_path / "out.gguf", tmp_path / "record.json"
    result = call(
        MODEL, str(out), "--how", "scale", "--tensors", "blk.*.attn_q.weight", "--layers", "2-3", "--strength", "1.2",
        "--seed", "5", "--checkpoint", str(EMBEDDED / "checkpoint"), "--json", str(record_file),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2 of 169 tensors changed" in unfolded(result.stdout) and "blk.3.attn_q.weight" in result.stdout
    record = load(DamageRecord, record_file)
    assert record.how == ["scale:1.2"] and record.seed == 5
    assert [row.name for row in record.changes] == ["blk.2.attn_q.weight", "blk.3.attn_q.weight"]
    with open_gguf(out) as copy:
        assert json.loads(copy.metadata[KEY])["tensors"] == ["blk.2.attn_q.weight", "blk.3.attn_q.weight"]
        assert copy.tensors["blk.2.attn_q.weight"].type == "Q4_K"


def test_a_truncated_copy_is_said_to_be_none(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = call(MODEL, str(out), "--how", "truncated")
    assert result.exit_code == 0 and "cut short on purpose" in result.stderr and "no whole GGUF" in result.stdout


def test_keys_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = call(MODEL, str(out), "--set", "gemma4.rope.freq_base=float:1e4", "--drop", "general.license")
    assert result.exit_code == 0 and "2 metadata keys changed" in unfolded(result.stdout), result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected MODEL and OUT"),
        ([MODEL], "expected MODEL and OUT"),
        ([MODEL, "OUT"], "expected a fault"),
        ([MODEL, "OUT", "--how", "nosie"], "did you mean noise"),
        ([MODEL, "OUT", "--how", "scale", "--tensors", "no.such"], "matches none"),
        ([MODEL, "OUT", "--how", "scale", "--layers", "x"], "expected layers, such as 0-5"),
        ([MODEL, MODEL, "--how", "scale"], "is the input itself"),
        (["no-such-file.gguf", "OUT", "--how", "scale"], "no such file"),
    ],
)
def test_unfit(tmp_path: Path, args: list[str], message: str) -> None:
    out = tmp_path / "out.gguf"
    result = call(*(str(out) if arg == "OUT" else arg for arg in args))
    assert result.exit_code == 2 and message in result.stderr and not result.stdout, result.output
    assert not out.exists()
