"""`diffharness restore` as a user calls it: exit codes, options, and where results go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffharness.cli.main import app
from diffharness.cli.restore import parse_share
from diffharness.errors import BadInputError
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import rewrite_gguf
from tests.e2e.issue_6056 import CHECKPOINT, CLEAN, HELDOUT


def restore(*arguments: object, tokens: int = 512, quiet: bool = True) -> tuple[int, str, str]:
    few = ["--checkpoint", str(CHECKPOINT), "--fixture", str(HELDOUT), "--tokens", str(tokens), "--threads", "1"]
    result = CliRunner().invoke(app, ["restore", *map(str, arguments), *few, *(["-q"] if quiet else [])])
    return result.exit_code, result.stdout, result.stderr


def test_a_clean_file_is_exit_0_and_a_wrong_key_exit_1(tmp_path: Path) -> None:
    code, output, _ = restore(CLEAN, "--tensors", "blk.*.attn_q.weight", "--markdown", tmp_path / "r.md")
    assert code == 0 and "verdict: agree" in output and "blk.*.attn_q.weight" in output
    assert (tmp_path / "r.md").read_text().startswith("### diffharness restore: agree")
    wrong = tmp_path / "wrong.gguf"
    with open_gguf(CLEAN) as source:
        rewrite_gguf(source, wrong, kv={"gemma4.final_logit_softcapping": 8.0})
    code, output, progress = restore(wrong, "--search", "--within", "0.02", "--budget", "5", "--json", "-", quiet=False)
    record = json.loads(output)
    assert code == 1 and record["schema"] == "diffharness.restore/1"
    assert record["search"]["keys"] == ["gemma4.final_logit_softcapping"] and record["search"]["within"] == 0.02
    assert "diffharness restore" in record["repro"] and "forward 1 of" in progress


def test_a_short_text_is_exit_125() -> None:
    code, output, _ = restore(CLEAN, "--layers", "0-1", tokens=48)
    assert code == 125 and "too few" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers", "11-12"], "expected layers from 0 to 11"),
        (["--tensors", "nothing*"], "expected tensors that fit"),
        (["--within", "much"], "expected --within as a share"),
        (["--by", "head"], "'head' is not one of"),
    ],
)
def test_unfit_options_are_exit_2(arguments: list[str], says: str) -> None:
    code, _, errors = restore(CLEAN, *arguments)
    assert code == 2 and says in " ".join(errors.split())


def test_another_models_checkpoint_is_exit_2(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["restore", str(CLEAN), "--checkpoint", str(tmp_path)])
    assert result.exit_code == 2 and "error:" in result.stderr


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.01", 0.01), ("0", 0.0), ("100%", 1.0), ("2.5%", 0.025)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "-1%", "101%", "nan", "one"])
def test_no_shares(text: str) -> None:
    with pytest.raises(BadInputError, match="--within"):
        parse_share(text)
