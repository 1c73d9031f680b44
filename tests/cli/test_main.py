"""The command line's frame: help and README for every command, and what each kind of error ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from diffharness import __version__
from diffharness.cli import _models, _output
from diffharness.cli.main import app
from diffharness.errors import BadInputError, OutputError

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def commands(command=None, path=()):  # type: ignore[no-untyped-def]
    """Every command of the app that does something, with its words."""
    command = command or typer.main.get_command(app)
    if hasattr(command, "commands"):
        for name, sub in command.commands.items():
            yield from commands(sub, (*path, name))
    else:
        yield " ".join(path), command


COMMANDS = dict(commands())


def run_main(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """`main()` in a process of its own, with a command `planted` whose body is `code`."""
    program = (
        "import sys, typer, signal, os\n"
        "from diffharness import errors\n"
        "from diffharness.cli import main\n"
        "from diffharness.cli._options import VerboseOption\n"
        "@main.app.command()\n"
        f"def planted(verbose: VerboseOption = 0):\n    {code}\n"
        f"sys.argv = ['diffharness', 'planted', *{list(args)!r}]\n"
        "main.main()\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_there_are_commands() -> None:
    assert {"run", "archs", "doctor"} <= COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_flows_to_any_width(name: str) -> None:
    assert COMMANDS[name].help
    assert all("\n" not in paragraph for paragraph in COMMANDS[name].help.split("\n\n"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_readme(name: str) -> None:
    assert f"`diffharness {name}" in README, f"README's table of commands lacks `diffharness {name}`"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert (command.help or "").strip(), f"{name} has no help text"
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert (parameter.help or "").strip(), f"{name}: {parameter.opts} has no help text"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str) -> None:
    result = CliRunner().invoke(app, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "diffharness", "--version"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.stdout == f"diffharness {__version__}\n"
    heavy = {"torch", "llama_cpp", "transformers"}
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not heavy & loaded, f"--version imports {heavy & loaded}"


def test_bad_usage_is_2() -> None:
    for args in (["no-such-command"], ["archs", "--no-such-option"], ["run", "--tokens", "many"]):
        assert CliRunner().invoke(app, args).exit_code == 2, args


@pytest.mark.parametrize(
    ("error", "code"),
    [("ArtifactFileError", 2), ("OutputError", 2), ("EngineError", 125), ("InconclusiveError", 125)],
)
def test_an_error_is_one_message_and_its_exit_code(error: str, code: int) -> None:
    done = run_main(f"raise errors.{error}('expected a, found b', hint='try c')")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "error: expected a, found b\nhint: try c\n")


def test_a_hint_is_optional() -> None:
    assert run_main("raise errors.FixtureError('no ids')").stderr == "error: no ids\n"


def test_an_unforeseen_error_is_70_on_one_line() -> None:
    done = run_main("raise RuntimeError('first line\\nsecond')")
    assert done.returncode == 70
    assert done.stderr == "internal error: RuntimeError: first line; run with -vv for the traceback\n"


def test_twice_verbose_gives_the_traceback() -> None:
    for code in ("raise RuntimeError('x')", "raise errors.FixtureError('x')"):
        assert "Traceback" in run_main(code, "-vv").stderr
        assert "Traceback" not in run_main(code, "-v").stderr


def test_a_message_cannot_steer_the_terminal() -> None:
    done = run_main("raise errors.FixtureError('name \\x1b[31mred', hint='one\\ntwo')")
    assert done.stderr == "error: name \\u{1b}[31mred\nhint: one two\n"


def test_a_file_without_a_command_is_told_the_command() -> None:
    result = CliRunner().invoke(app, ["a b.gguf", "--tokens", "64"])
    assert result.exit_code == 2
    assert "hint: diffharness run 'a b.gguf' --tokens 64" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", [["archs", "--json", "-"], ["archs"], ["doctor"]])
def test_a_full_standard_output_is_2(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        program = [sys.executable, "-m", "diffharness", *command]
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: cannot write to standard output") and "Traceback" not in done.stderr


def test_interrupt_while_modules_load_is_130() -> None:
    program = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from diffharness.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_interrupt_is_130() -> None:
    done = run_main("os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(5)")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_terminate_cleans_up() -> None:
    kill = "try: os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(5)"
    done = run_main(f"{kill}\n    finally: print('clean')")
    assert (done.returncode, done.stdout) == (143, "clean\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    program = [sys.executable, "-m", "diffharness", "archs", "--json", "-"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


def test_archs_lists_what_is_supported() -> None:
    result = CliRunner().invoke(app, ["archs", "--json", "-"])
    rows = {row["arch"]: row for row in json.loads(result.stdout)}
    assert {"llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "gemma4"} <= rows.keys()
    for row in rows.values():
        assert "llama.cpp" in row["witnesses"], row
        assert row["model_types"] and row["classes"] and row["what"], row
    assert "mistral" in rows["llama"]["model_types"]


def test_archs_table_names_each() -> None:
    result = CliRunner().invoke(app, ["archs"])
    assert result.exit_code == 0
    assert "qwen3moe" in result.stdout and "gemma4" in result.stdout


# ---- files and models


def test_write_text_is_whole_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        _output.write_text(target, "after \ud800")
    assert target.read_text() == "before"
    _output.write_text(target, "after")
    assert target.read_text() == "after"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_write_text_leaves_devices_pipes_and_links_what_they_are(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    _output.require_writable(pipe)
    _output.write_text(pipe, "through")
    assert os.read(reader, 99) == b"through" and pipe.is_fifo()
    os.close(reader)
    link.symlink_to("target.json")
    _output.write_text(link, "x")
    assert link.is_symlink() and (tmp_path / "target.json").read_text() == "x"


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "missing" / "out.json", tmp_path, tmp_path / "file" / "out.json"):
        with pytest.raises(OutputError, match="cannot write"):
            _output.write_text(bad, "x")
        with pytest.raises(OutputError, match="cannot write"):
            _output.require_writable(None, _output.STDOUT, bad)
    with pytest.raises(OutputError, match="cannot write"):
        _output.make_folder(tmp_path / "file" / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_require_writable_leaves_nothing(tmp_path: Path) -> None:
    _output.require_writable(tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []


def test_only_one_result_takes_standard_output() -> None:
    assert _output.taken(_output.STDOUT, None)
    assert not _output.taken(Path("out.json"), None)
    with pytest.raises(BadInputError, match="at most one"):
        _output.taken(_output.STDOUT, _output.STDOUT)
    with pytest.raises(BadInputError, match="at most one"):
        _output.require_writable(_output.STDOUT, _output.STDOUT)


def test_split_parts() -> None:
    assert _models.split_parts("m.gguf") == ["m.gguf"]
    assert _models.split_parts("one-of-2.gguf") == ["one-of-2.gguf"]
    assert _models.split_parts("q/m-00001-of-00003.gguf") == [f"q/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_model_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return f"/cache/{file}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert _models.model_path("a/b.gguf") == Path("a/b.gguf")
    assert _models.model_path("hf://owner/repo@v1/q/m-00001-of-00002.gguf") == Path("/cache/q/m-00001-of-00002.gguf")
    assert asked == [("owner/repo", f"q/m-0000{i}-of-00002.gguf", "v1") for i in (1, 2)]
    with pytest.raises(BadInputError, match="expected hf://"):
        _models.model_path("hf://owner/repo")

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(BadInputError, match="not in the local cache"):
        _models.model_path("hf://owner/repo/m.gguf")
