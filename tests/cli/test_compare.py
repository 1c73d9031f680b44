"""`diffharness compare`: saved runs against each other; what differs is named, and nothing is taken for the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from diffharness.captures import CaptureWriter
from diffharness.cli.main import app
from diffharness.records import (
    ArtifactSubject,
    EngineSubject,
    FixtureSubject,
    RunRecord,
    Score,
    Scores,
    Subject,
    Verdict,
    VerdictKind,
)

N, WIDTH, VOCAB = 12, 8, 16
TAPS = ("token_embd", "blk.0.attn_q", "blk.0.layer_out", "blk.1.layer_out", "logits")
Change = Callable[[dict[str, Any]], None]


def values() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {tap: rng.standard_normal((N, VOCAB if tap == "logits" else WIDTH)).astype(np.float32) for tap in TAPS}


def saved(
    folder: Path,
    change: Change | None = None,
    *,
    verdict: VerdictKind = "agree",
    sha256: str = "a" * 64,
    ids: str = "f" * 64,
    captures: tuple[str, ...] = ("engine-native-callback-off", "engine-strict-callback-on"),
    **engine: Any,
) -> Path:
    """A run folder as --out leaves it, with `change` made to the strict capture's taps."""
    folder.mkdir()
    record = RunRecord(
        verdict=Verdict(primary=verdict, all=[verdict], summary="said."),
        scores=Scores(reference={"artifact": Score(ppl=3.5, nll=1.2)}, engine={"native": Score(ppl=3.6, nll=1.3)}),
        subject=Subject(
            artifact=ArtifactSubject(path="m.gguf", sha256=sha256),
            fixture=FixtureSubject(name="english", n_tokens=N, n_scored=6, sha256=ids),
            engine=EngineSubject(version="1", settings={"n_ubatch": 512, "name": "native"}, **engine),
        ),
    )
    (folder / "run.json").write_text(record.to_json())
    for name in captures:
        taps = values()
        if change is not None and "strict" in name:
            change(taps)
        if "native" in name:
            taps = {"logits": taps["logits"]}
        with CaptureWriter(folder / f"{name}.safetensors", len(next(iter(taps.values())))) as writer:
            for tap, array in taps.items():
                writer.write(tap, 0, array)
    return folder


def compare(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_same_run_is_exit_0(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b")
    code, output, progress = compare(a, b, "--json", tmp_path / "r.json", "--markdown", tmp_path / "r.md")
    assert code == 0, output
    assert "6 taps of 2 captures agree within NMSE 1e-06 at all 12 tokens" in " ".join(output.split())
    assert "comparing engine-strict" in progress
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["schema"] == "diffharness.compare/1" and record["outcome"] == "same" and record["unlike"] == []
    assert (tmp_path / "r.md").read_text().startswith("### diffharness compare: pass")


def scaled(tap: str, token: int, by: float = 1.01) -> Change:
    def change(taps: dict[str, Any]) -> None:
        taps[tap][token] *= by

    return change


def test_one_token_of_one_tap_is_found_and_named(tmp_path: Path) -> None:
    """Also where the mean over the tap hides it."""
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", scaled("blk.0.layer_out", 7, 1 + 2e-3))
    code, output, _ = compare(a, b, "--json", tmp_path / "r.json")
    assert code == 1
    (row,) = [row for row in json.loads((tmp_path / "r.json").read_text())["captures"] if not row["ok"]]
    assert (row["name"], row["first_tap"], row["first_token"]) == ("engine-strict-callback-on", "blk.0.layer_out", 7)
    failing = [tap for tap in row["taps"] if not tap["ok"]]
    assert [tap["tap"] for tap in failing] == ["blk.0.layer_out"] and failing[0]["nmse"] < 1e-6
    assert "first at blk.0.layer_out, token 7" in " ".join(output.split())
    assert compare(a, b, "--tolerance", "1e-4")[0] == 0


def test_positions_whose_logits_differ_are_listed(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", scaled("logits", 5, -1.0))
    code, output, _ = compare(a, b, "--json", tmp_path / "r.json", "-q")
    assert code == 1 and len(output.splitlines()) == 1 and "first at logits, token 5" in output
    (row,) = [row for row in json.loads((tmp_path / "r.json").read_text())["captures"] if not row["ok"]]
    (position,) = row["positions"]
    assert position["token"] == 5 and position["nmse"] == pytest.approx(4.0) and position["top1"] is False
    assert row["n_positions"] == 1 and row["logits"]["top1"] == pytest.approx(11 / 12)


def test_a_value_that_is_not_finite_is_never_the_same(tmp_path: Path) -> None:
    def change(taps: dict[str, Any]) -> None:
        taps["blk.1.layer_out"][2, 3] = np.nan

    a, b = saved(tmp_path / "a", change), saved(tmp_path / "b", change)
    code, output, _ = compare(a, b, "--tolerance", "1")
    assert code == 1 and "blk.1.layer_out" in output


def test_another_verdict_differs_though_the_numbers_are_the_same(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", verdict="engine.kernel")
    code, output, _ = compare(a, b)
    assert code == 1 and "the verdict was agree and is engine.kernel" in " ".join(output.split())


def test_what_is_unlike_is_told(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", commit="beef", overrides=["a=int:1"])
    code, output, _ = compare(a, b)
    assert code == 0 and "engine commit" in output and "beef" in output and "overrides" in output


@pytest.mark.parametrize(("changes", "says"), [({"sha256": "b" * 64}, "artifact: "), ({"ids": "e" * 64}, "fixture: ")])
def test_unlike_inputs_are_refused_unless_told(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", **changes)
    code, _, errors = compare(a, b)
    assert code == 2 and says in errors and "--anyway" in errors
    assert compare(a, b, "--anyway")[0] == 0


def test_captures_of_other_shapes_are_compared_where_they_can_be(tmp_path: Path) -> None:
    def change(taps: dict[str, Any]) -> None:
        del taps["token_embd"]
        taps["blk.0.attn_q"] = taps["blk.0.attn_q"][:, :4]
        for tap in taps:
            taps[tap] = taps[tap][:9]

    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", change, ids="e" * 64)
    code, output, _ = compare(a, b, "--anyway", "--json", tmp_path / "r.json")
    row = json.loads((tmp_path / "r.json").read_text())["captures"][1]
    assert code == 0 and row["n_tokens"] == 9 and row["unmatched"] == ["token_embd", "blk.0.attn_q"]
    assert "not in both" in output


def test_nothing_in_common_is_exit_125(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", captures=("engine-x",)), saved(tmp_path / "b", captures=("engine-y",))
    code, _, errors = compare(a, b)
    assert code == 125 and "keep no tap in common: engine-x and engine-y" in errors
    c = saved(tmp_path / "c", captures=())
    assert compare(a, c)[0] == 125


def test_a_capture_that_the_golden_run_has_and_the_other_lacks_is_a_difference(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", captures=("engine-strict-callback-on",))
    code, output, _ = compare(a, b)
    assert code == 1 and "B lacks engine-native-callback-off" in " ".join(output.split())
    code, output, _ = compare(b, a)
    assert code == 0 and "only B has the capture engine-native-callback-off" in output


def test_unreadable_is_exit_2(tmp_path: Path) -> None:
    a = saved(tmp_path / "a")
    for path in (tmp_path / "absent", a / "run.json"):
        code, _, errors = compare(a, path)
        assert code == 2 and "expected the folder of a run" in errors
    (tmp_path / "empty").mkdir()
    assert compare(tmp_path / "empty", a)[0] == 2
    b = saved(tmp_path / "b")
    (b / "engine-strict-callback-on.safetensors").write_bytes(b"\xff" * 40)
    code, _, errors = compare(a, b)
    assert code == 2 and "is not a capture" in errors
    old = json.loads((b / "run.json").read_text()) | {"schema": "diffharness.run/0"}
    (b / "run.json").write_text(json.dumps(old))
    code, _, errors = compare(a, b)
    assert code == 2 and "expected schema 'diffharness.run/1', found 'diffharness.run/0'" in errors
