"""What the commands make of their shared options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffharness.cli import _models, _request
from diffharness.cli._request import ARGUMENTS


def test_settings_are_native_unless_named_and_threads_are_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    assert _request.engine_settings(None, None).name == "native" and told == []
    assert _request.engine_settings("strict", 3).threads == 3 and told == [3]


def test_the_embedded_model_is_there() -> None:
    own = _models.embedded()
    assert own.model.is_file() and own.checkpoint.is_dir() and Path(own.fixture).is_file()


def test_the_command_line_can_be_run_again() -> None:
    class Context:
        meta = {ARGUMENTS: ("run", "my model.gguf")}  # noqa: RUF012

    assert _request.command_line(Context()) == "diffharness run 'my model.gguf'"  # type: ignore[arg-type]


def test_progress_is_harmless_and_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    _request.progress_lines(quiet=False)("a \x1b[31mred[bold] name")
    _request.progress_lines(quiet=True)("nothing")
    seen = capsys.readouterr()
    assert seen.out == "" and "\x1b" not in seen.err and "red[bold] name" in seen.err and "nothing" not in seen.err
