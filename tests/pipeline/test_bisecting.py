"""Lists of builds, with a change planted in the middle, and builds that do not run: right place, right exit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffharness.cli.main import app
from diffharness.errors import BadInputError, InconclusiveError
from diffharness.pipeline.bisecting import BisectRequest, On, run
from diffharness.records.bisect import BisectRecord
from diffharness.report.bisect import document
from diffharness.report.document import to_text
from diffharness.settings import EngineSettings, load_tolerances
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.conftest import make_pair as make_pair  # fixtures that this file shares
from tests.engine import stand_in as planted
from tests.engine.stand_in import stand_in
from tests.oracles.conftest import make_tiny as make_tiny

CODE = {
    "same": planted.SAME,
    "rope": planted.OTHER_ROPE,
    "numbers": planted.OTHER_NUMBERS,
    "unloadable": planted.DIES_LOADING,
    "dies": planted.DIES_RUNNING,
    "hangs": planted.HANGS_LOADING,
}
Search = Callable[..., BisectRecord]


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    return make_pair("llama", "Q8_0")


@pytest.fixture
def search(pair: Pair, tmp_path: Path) -> Search:
    """Bisect a list of builds that are called by what was done to them."""

    def find(word: str) -> EngineSettings:
        kind = word.rstrip("0123456789")
        return EngineSettings(
            name=word,
            threads=1,
            python=stand_in(tmp_path / word, CODE[kind]),
            time_limit_s=6 if kind == "hangs" else 60,
        )

    def searched(*engines: str, on: On = "numbers", **changes: object) -> BisectRecord:
        request = {"model": pair.gguf, "fixture": str(pair.fixture), "n_tokens": 32, "tolerances": load_tolerances()}
        return run(BisectRequest(engines=engines, find=find, on=on, **{**request, **changes}))  # type: ignore[arg-type]

    return searched


def test_the_first_changed_build_is_found(search: Search) -> None:
    record = search("same0", "same1", "same2", "numbers3", "numbers4", "numbers5")
    assert (record.outcome, record.last_same, record.first_changed) == ("changed", 2, 3)
    assert record.summary.startswith("first changed: numbers3 (same2 was the last good): logits NMSE 1.0e-04")
    assert [step.index for step in record.steps] == [0, 5, 2, 3] and record.steps[0].state == "first"
    assert record.next_step is not None and record.next_step.endswith("--engine same2 --engine numbers3")
    text = to_text(document(record))
    assert "numbers3" in text and "4 were run" in text and "numbers4" not in text


def test_a_floor_decides_what_counts(search: Search) -> None:
    record = search("same0", "numbers1", floor=1e-3)
    assert record.outcome == "unchanged" and record.steps[1].logits is not None
    assert 9e-5 < record.steps[1].logits.nmse < 1.1e-4


def test_ends_that_are_the_same(search: Search) -> None:
    record = search("same0", "numbers1", "same2")
    assert (record.outcome, len(record.steps)) == ("unchanged", 2) and "undone between" in record.summary


def test_builds_that_do_not_run_are_skipped(search: Search) -> None:
    record = search("same0", "unloadable1", "same2", "numbers3", "hangs4", "unloadable5")
    assert (record.outcome, record.first_changed) == ("changed", 3)
    skipped = {step.index: step.reason or "" for step in record.steps if step.state == "skipped"}
    assert "SIGILL" in skipped[5] and "did not finish within 6 s" in skipped[4]


def test_skips_that_hide_the_change(search: Search) -> None:
    record = search("same0", "unloadable1", "numbers2")
    assert (record.outcome, record.candidates) == ("unclear", [1, 2])
    assert "unloadable1 between them does not run" in record.summary


def test_nothing_but_skips_behind_the_first(search: Search) -> None:
    record = search("same0", "same1", "unloadable2")
    assert record.outcome == "unclear" and "same1 is the same as same0" in record.summary
    assert search("same0", "unloadable1").outcome == "unclear"
    with pytest.raises(InconclusiveError, match="the first engine, unloadable0, does not run"):
        search("unloadable0", "same1")


def test_a_death_over_the_tokens_is_a_change_unless_told_otherwise(search: Search) -> None:
    record = search("same0", "same1", "dies2")
    assert (record.outcome, record.first_changed) == ("changed", 2) and "engine.crash" in record.summary
    assert search("same0", "same1", "dies2", skip_crash=True).outcome == "unclear"


def test_a_verdict_that_changes(search: Search) -> None:
    record = search("same0", "same1", "rope2", on="verdict")
    assert (record.outcome, record.first_changed) == ("changed", 2)
    assert "the verdict was agree and is engine.graph" in record.summary
    changed = next(step for step in record.steps if step.index == 2)
    assert changed.first_divergence is not None and changed.first_divergence.tap == "blk.0.attn_q_rope"
    assert search("same0", "numbers1", on="numbers").outcome == "changed"


def test_a_list_of_one(search: Search) -> None:
    with pytest.raises(BadInputError, match="at least two engines"):
        search("same0")


# ---- the command


def command(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bisect", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_line(pair: Pair, tmp_path: Path) -> None:
    few = ["--fixture", pair.fixture, "--tokens", 16, "--threads", 1, "--on", "numbers"]
    same, other = stand_in(tmp_path / "a"), stand_in(tmp_path / "b", planted.OTHER_NUMBERS)
    code, output, progress = command(pair.gguf, "--engines", same, same, other, *few, "--json", tmp_path / "r.json")
    assert code == 1 and "first changed" in output and "engine 2 of 3" in progress
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["schema"] == "diffharness.bisect/1" and record["first_changed"] == 2
    assert record["repro"].startswith("diffharness bisect")
    code, output, progress = command(pair.gguf, "--engines", same, "--engines", other, *few, "-q")
    assert code == 1 and len(output.splitlines()) == 1 and output.startswith("first changed:") and progress == ""
    assert command(pair.gguf, "--engines", same, same, *few, "-q")[0] == 0
    dead = stand_in(tmp_path / "c", planted.DIES_LOADING)
    assert command(pair.gguf, "--engines", same, dead, *few, "-q")[0] == 125


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["M.gguf", "--engines", "native"], "at least two engines"),
        (["M.gguf"], "at least two engines"),
        (["M.gguf", "native", "native"], "expected one --engines with the list behind it, found none"),
        (["M.gguf", "--engines", "native", "--engines", "native", "native"], "found 2 of them and 1 words besides"),
        (["--engines", "native", "native", "M.gguf"], "expected engines, found the model M.gguf"),
        (["M.gguf", "--engines", "native", "natvie"], "no engine settings are called natvie"),
        (["M.gguf", "--engines", "native", "absent/bin"], "no such file or folder"),
        (["M.gguf", "--engines", "native", "native"], "M.gguf"),
    ],
)
def test_unfit_lists_are_exit_2(arguments: list[str], says: str) -> None:
    code, _, errors = command(*arguments)
    assert code == 2 and says in " ".join(errors.split())
