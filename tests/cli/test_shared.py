"""Options that commands take by name, and get in one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from diffharness.cli._shared import Shared, takes
from diffharness.errors import OutputError, SettingsError

app = typer.Typer()
given: list[tuple[Shared, int, str]] = []


@app.command("planted")
@takes("fixture tokens override_kv dtype json_file quiet")
def planted(
    shared: Shared, word: Annotated[str, typer.Argument()], number: Annotated[int, typer.Option("--number")] = 7
) -> None:
    """What it says of itself."""
    given.append((shared, number, word))


@pytest.fixture(autouse=True)
def _nothing_yet() -> None:
    given.clear()


def test_a_command_gets_what_it_takes_and_its_own() -> None:
    words = "w --tokens 9 --override-kv a=int:1 --override-kv b=int:2 --number 3 --dtype float64 -q"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    [(shared, number, word)] = given
    assert (number, word, shared.tokens, shared.dtype, shared.quiet) == (3, "w", 9, "float64", True)
    assert shared.overrides == ("a=int:1", "b=int:2")
    assert shared.forward["n_tokens"] == 9 and shared.forward["dtype"] == "float64"


def test_what_is_not_given_or_not_taken_has_its_default() -> None:
    assert CliRunner().invoke(app, ["w"]).exit_code == 0
    [(shared, number, _)] = given
    assert number == 7 and shared == Shared(repro=shared.repro) and shared.overrides == ()


def test_an_option_that_is_not_taken_is_none_of_the_command() -> None:
    assert CliRunner().invoke(app, ["w", "--device", "cuda"]).exit_code == 2
    assert not given


def test_help_is_the_commands_own_options_first() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "What it says of itself." in shown
    options = ["--number", "--fixture", "--tokens", "--override-kv", "--dtype", "--json", "--quiet"]
    places = [shown.index(option) for option in options]
    assert places == sorted(places) and "--ctx" not in shown and "--shared" not in shown


def test_a_file_that_cannot_be_written_ends_it_before_the_work(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["w", "--json", str(tmp_path / "nowhere" / "x.json")])
    assert isinstance(done.exception, OutputError) and not given


@pytest.mark.parametrize(("name", "content"), [("m.gguf", b"GGUF\3"), ("m.bin", b"GGUF\3"), ("m.safetensors", b"{}")])
def test_a_report_does_not_replace_a_model(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    done = CliRunner().invoke(app, ["w", "--json", str(tmp_path / name)])
    assert isinstance(done.exception, OutputError) and "a model is there" in done.exception.message and not given
    (tmp_path / "old.json").write_text("{}")
    assert CliRunner().invoke(app, ["w", "--json", str(tmp_path / "old.json")]).exit_code == 0


def test_a_device_that_is_not_there_ends_it_before_the_work() -> None:
    assert Shared(device="cpu").forward["device"] == "cpu"
    with pytest.raises(SettingsError, match="found 'nowhere'"):
        _ = Shared(device="nowhere").forward


def test_an_unknown_name_is_told_at_once() -> None:
    with pytest.raises(KeyError):
        takes("fixture no_such_option")
