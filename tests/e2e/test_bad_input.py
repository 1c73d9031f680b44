"""Unfit input: one clear message, the right exit code, nothing half-written and no process left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from diffharness.cli.main import app
from diffharness.fixture import from_ids, save_fixture
from diffharness.pipeline.folder import run_folder
from diffharness.records import load_record
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import encode_floats, rewrite_gguf
from tests.e2e.conftest import MakePair, Pair


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    return make_pair("llama", "Q8_0")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["run", "--quiet", "--threads", "1", *map(str, arguments)])


def refused(result: Result, *words: str, code: int = 2) -> None:
    """Exit code, one `error:` line that says these words, and no traceback."""
    assert result.exit_code == code, result.output
    text = result.stderr + result.stdout
    assert "Traceback" not in text
    for word in words:
        assert word in text, (word, text)


def rewritten(pair: Pair, out: Path, **changes: Any) -> Path:
    with open_gguf(pair.gguf) as source:
        rewrite_gguf(source, out, **changes)
    return out


def test_wrong_path(tmp_path: Path, pair: Pair) -> None:
    refused(invoke(tmp_path / "nothing.gguf"), "no such file")
    refused(invoke(tmp_path), "folder")
    refused(invoke(pair.gguf, "--fixture", tmp_path / "nothing.json"), "fixture")
    refused(invoke(pair.gguf, "--fixture", pair.fixture, "--checkpoint", tmp_path / "nothing"), "nothing")


def test_not_a_gguf(tmp_path: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("This is not a model. " * 50)
    refused(invoke(file), "GGUF")
    file.write_bytes(b"")
    refused(invoke(file))


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.05, 0.5, 0.99])
def test_truncated(tmp_path: Path, pair: Pair, share: float) -> None:
    whole = pair.gguf.read_bytes()
    file = tmp_path / "short.gguf"
    file.write_bytes(whole[: max(5, int(len(whole) * share))])
    record = tmp_path / "record.json"
    refused(invoke(file, "--json", record), "cut off")
    assert json.loads(record.read_text())["verdict"]["primary"] == "artifact.file"


def test_sizes_that_overflow(tmp_path: Path, pair: Pair) -> None:
    whole = bytearray(pair.gguf.read_bytes())
    whole[8:16] = (2**62).to_bytes(8, "little")  # the number of tensors
    file = tmp_path / "many.gguf"
    file.write_bytes(whole)
    refused(invoke(file), "tensors")


def test_unknown_architecture(tmp_path: Path, pair: Pair) -> None:
    """What needs no reference is done; where the engine does not know it either, that is nothing."""
    file = rewritten(pair, tmp_path / "unknown.gguf", kv={"general.architecture": "rwkv7"})
    record = tmp_path / "record.json"
    result = invoke(file, "--fixture", pair.fixture, "--json", record)
    assert result.exit_code == 125 and "does not know 'rwkv7' models" in " ".join(result.output.split())
    assert load_record(record).verdict.all == ["inconclusive"], "a file that may be sound is not accused"


def test_missing_extra_and_misshapen_tensors(tmp_path: Path, pair: Pair) -> None:
    missing = rewritten(pair, tmp_path / "missing.gguf", without=["blk.1.attn_k.weight"])
    refused(invoke(missing, "--fixture", pair.fixture), "blk.1.attn_k.weight", "missing")

    def wider(info: Any, raw: Any) -> Any:
        if info.name != "blk.0.attn_norm.weight":
            return None
        shape = (info.shape[0] * 2,)
        return "F32", shape, encode_floats(np.ones(shape, np.float32), "F32")

    misshapen = rewritten(pair, tmp_path / "misshapen.gguf", tensor=wider)
    refused(invoke(misshapen, "--fixture", pair.fixture), "blk.0.attn_norm.weight", "shape")
    deeper = rewritten(pair, tmp_path / "extra.gguf", kv={"llama.block_count": 2})
    refused(invoke(deeper, "--fixture", pair.fixture), "blk.2.")
    deepest = rewritten(pair, tmp_path / "deepest.gguf", kv={"llama.block_count": 500_000_000})
    refused(invoke(deepest, "--fixture", pair.fixture), "deepest.gguf: metadata key", "at most 4096", "hint: ")


def copied(pair: Pair, folder: Path) -> Path:
    return Path(shutil.copytree(pair.checkpoint, folder / "checkpoint"))


def test_unfit_checkpoints(tmp_path: Path, pair: Pair, make_pair: MakePair) -> None:
    with_fixture = ("--fixture", pair.fixture, "--checkpoint")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(invoke(pair.gguf, *with_fixture, empty), "config.json")
    other = make_pair("qwen3", "Q8_0").checkpoint
    refused(invoke(pair.gguf, *with_fixture, other), "qwen3", "llama")
    narrow = make_pair("llama").checkpoint
    refused(invoke(pair.gguf, *with_fixture, narrow), "shape")
    shardless = copied(pair, tmp_path)
    (shardless / "model.safetensors").unlink()
    refused(invoke(pair.gguf, *with_fixture, shardless), "safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (shardless / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(invoke(pair.gguf, *with_fixture, shardless), "model-00001-of-00002.safetensors")


def fixture_of(ids: list[int], folder: Path, chunk: int = 512) -> Path:
    path = folder / f"ids-{len(ids)}-{max(ids)}.json"
    save_fixture(from_ids(ids, chunk=chunk), path)
    return path


def test_unfit_fixtures(tmp_path: Path, pair: Pair) -> None:
    refused(invoke(pair.gguf, "--fixture", fixture_of([1, 2, 3, 100000], tmp_path)), "100000", "vocabulary")
    refused(invoke(pair.gguf, "--fixture", fixture_of([1, 2] * 200, tmp_path)), "context")
    empty = tmp_path / "empty.json"
    empty.write_text('{"schema": "diffharness.fixture/1", "name": "empty", "ids": []}')
    refused(invoke(pair.gguf, "--fixture", empty), "0 tokens")
    refused(invoke(pair.gguf, "--fixture", pair.fixture, "--tokens", "100000"), "100000")
    refused(invoke(pair.gguf), "no tokenizer", "--fixture")


def test_places_that_cannot_be_written(tmp_path: Path, pair: Pair) -> None:
    file = tmp_path / "file"
    file.touch()
    refused(invoke(pair.gguf, "--fixture", pair.fixture, "--out", file / "run"), "cannot write")
    refused(invoke(pair.gguf, "--fixture", pair.fixture, "--json", tmp_path / "no" / "record.json"), "cannot write")


def test_disk_full(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    out = tmp_path / "run"
    refused(invoke(pair.gguf, "--fixture", pair.fixture, "--out", out), "space")
    assert not out.exists()


def test_no_room_for_a_file_as_it_grows(tmp_path: Path, pair: Pair) -> None:
    """The disk fills up after it was asked how much is free: here a limit on the size of files."""
    out, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "diffharness", "run", str(pair.gguf), "--fixture", str(pair.fixture), "-q"]
    for limit, extra in ((1 << 17, []), (1 << 17, ["--out", str(out)]), (2 << 20, [])):
        done = subprocess.run(
            [*command, *extra], capture_output=True, text=True, timeout=120,
            env={**os.environ, "TMPDIR": str(temporary)},
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and "hint: " in done.stderr and "Traceback" not in done.stderr
        assert not out.exists() and not list(temporary.iterdir())


def test_one_run_folder_for_one_run(tmp_path: Path, pair: Pair) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with run_folder(out):
        refused(invoke(pair.gguf, "--fixture", pair.fixture, "--out", out), "another run", "--out")
    assert list(out.iterdir()) == []


def test_a_folder_made_for_a_run_that_cannot_be_goes_again(tmp_path: Path, pair: Pair) -> None:
    out = tmp_path / "run"
    refused(invoke(pair.gguf, "--fixture", pair.fixture, "--out", out, "--device", "toaster"), "toaster", "hint: cpu")
    assert not out.exists()


def test_a_name_from_the_file_cannot_steer_the_terminal(tmp_path: Path, pair: Pair) -> None:
    file = rewritten(pair, tmp_path / "evil.gguf", kv={"general.architecture": "rwkv7\x1b]0;owned\x07"})
    result = invoke(file, "--fixture", pair.fixture)
    assert result.exit_code == 125 and "rwkv7" in result.output
    assert "\x1b" not in result.output and "\x07" not in result.output


def test_bad_settings(tmp_path: Path, pair: Pair) -> None:
    with_fixture = ("--fixture", pair.fixture)
    refused(invoke(pair.gguf, *with_fixture, "--engine", "nothing"), "nothing", "native")
    refused(invoke(pair.gguf, *with_fixture, "--override-kv", "llama.rope.freq_base=9"), "KEY=TYPE:VALUE")
    refused(invoke(pair.gguf, *with_fixture, "--override-kv", "llama.rope.freq_base=int:9"), "float:VALUE")
    refused(invoke(pair.gguf, *with_fixture, "--device", "toaster"), "toaster")
    refused(invoke("no-model.gguf", *with_fixture, "--grid", "fine"), "no grid is called fine")  # before any work
    settings = tmp_path / "engine.yaml"
    settings.write_text("n_ubatch: many\n")
    refused(invoke(pair.gguf, *with_fixture, "--engine", settings), "n_ubatch")


def workers(marker: str) -> list[int]:
    """Processes whose command line or job names `marker`, ourselves left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
                files = [os.readlink(link) for link in (entry / "fd").iterdir()]
            except OSError:
                continue
            if marker.encode() in command or any(marker in file for file in files):
                found.append(int(entry.name))
    return found


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing_behind(tmp_path: Path, pair: Pair, number: signal.Signals) -> None:
    out, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    command = [
        sys.executable,
        "-m",
        "diffharness",
        "run",
        str(pair.gguf),
        "--fixture",
        str(pair.fixture),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(temporary)}
    )
    assert eventually(lambda: out.is_dir() and any(out.glob("engine-*")), 60), "the engine never began to write"
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + number, stderr
    assert "Traceback" not in stderr and stdout == ""
    assert eventually(lambda: not workers(str(out)), 10), "a worker outlived the run"
    assert not list(out.glob("*.part")) and not list(out.glob("*.gguf"))
    assert not list(temporary.glob("diffharness-*"))
