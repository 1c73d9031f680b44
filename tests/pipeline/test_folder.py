from __future__ import annotations

from pathlib import Path

import pytest

from diffharness.errors import OutputError
from diffharness.pipeline.folder import run_folder

OLD = ("engine-native-callback-on.safetensors", "reference-checkpoint.safetensors", "run.json", "report.md")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_folder_holds_one_run_and_what_is_not_a_runs(tmp_path: Path) -> None:
    for name in (*OLD, "notes.txt"):
        (tmp_path / name).write_text("")
    with run_folder(tmp_path) as folder:
        assert folder == tmp_path and names(folder) == {"notes.txt"}
        (folder / OLD[0]).write_text("new")
    assert names(tmp_path) == {"notes.txt", OLD[0]}


def test_a_run_that_fails_leaves_no_captures(tmp_path: Path) -> None:
    def fail() -> None:
        with run_folder(tmp_path) as folder:
            (folder / OLD[0]).write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == set()


def test_only_one_run_at_a_time(tmp_path: Path) -> None:
    with run_folder(tmp_path) as folder:
        (folder / OLD[0]).write_text("first")
        with pytest.raises(OutputError, match="another run"), run_folder(tmp_path):
            pass
        assert (folder / OLD[0]).read_text() == "first"
    with run_folder(tmp_path):
        pass


def test_without_a_folder_nothing_stays() -> None:
    with run_folder(None) as folder:
        (folder / "x").write_text("")
    assert not folder.exists()
