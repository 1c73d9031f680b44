"""`diffharness explain` as a user calls it: exit codes, and where results go."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from diffharness.cli.main import app


def explain(*arguments: object) -> tuple[int, str, str]:
    few = ["--tokens", "48", "--threads", "1", "-q"]
    result = CliRunner().invoke(app, ["explain", *map(str, arguments), *few])
    return result.exit_code, result.stdout, result.stderr


def test_a_sound_engine_has_nothing_to_explain() -> None:
    code, output, _ = explain()
    assert code == 0 and "There is nothing to explain" in output


def test_a_wrong_engine_is_explained_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, output, _ = explain("--override-kv", "gemma4.final_logit_softcapping=float:0", "--out", out, "--json", "-")
    record = json.loads(output)
    assert code == 1 and record["schema"] == "diffharness.explain/1" and record["verdict"]["primary"] == "engine.graph"
    assert record["explanation"]["hypotheses"][0]["says"] == "final_logit_softcapping were absent"
    assert "as if final_logit_softcapping were absent" in record["verdict"]["summary"]
    assert json.loads((out / "explain.json").read_text()) == record
    assert (out / "explain.md").read_text().startswith("### diffharness explain: engine.graph")


def test_a_budget_that_is_too_small_still_tells_what_is_known() -> None:
    code, output, _ = explain("--override-kv", "gemma4.attention.sliding_window=int:9", "--budget", "1")
    assert code == 1 and "ended at its bound" in output


def test_unfit_input_is_exit_2(tmp_path: Path) -> None:
    code, _, errors = explain(tmp_path / "no.gguf")
    assert code == 2 and "error:" in errors
