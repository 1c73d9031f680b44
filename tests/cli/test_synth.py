"""`diffharness synth` from outside: the files, that they are the same again, and what unfit sizes say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffharness.cli.main import app
from diffharness.fixture import load_fixture
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import open_gguf


def synth(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["synth", *map(str, args)])
    return done.exit_code, done.output


def test_the_same_options_make_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        code, output = synth("qwen3", tmp_path / name, "--seed", 3)
        assert code == 0, output
    for file in ("qwen3-F32.gguf", "checkpoint/model.safetensors", "checkpoint/config.json", "ids.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert synth("qwen3", tmp_path / "c", "--seed", 4)[0] == 0
    first, other = (tmp_path / name / "qwen3-F32.gguf" for name in ("a", "c"))
    assert first.stat().st_size == other.stat().st_size and first.read_bytes() != other.read_bytes()


def test_sizes_types_and_keys_are_as_asked(tmp_path: Path) -> None:
    sizes = ("--width", 256, "--ff", 512, "--layers", 2, "--heads", 8, "--kv-heads", 4, "--vocab", 300)
    code, output = synth("llama", tmp_path, *sizes, "--type", "q4_k", "--set", "rms_norm_eps=1e-2", "--json", "-")
    assert code == 0, output
    record = json.loads(output)
    assert record["types"]["Q4_K"] == 2 + 2 * 7 and record["narrow"] == []
    with open_gguf(record["gguf"]) as gguf:
        assert gguf.metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-2)
        assert gguf.tensors["blk.1.attn_k.weight"].shape == (4 * 32, 256)
        assert gguf.tensors["token_embd.weight"].shape == (300, 256)
    assert Checkpoint(tmp_path / "checkpoint").tensors["blk.1.ffn_up.weight"].shape == (512, 256)
    ids = load_fixture(tmp_path / "ids.json").ids
    assert len(ids) == 128 and max(ids) >= 160


def test_rows_too_narrow_for_the_type_are_told(tmp_path: Path) -> None:
    code, output = synth("llama", tmp_path, "--type", "Q4_K", "--width", 256)
    assert code == 0 and "matrices stay F32" in output and "256 for K types" in output


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["no-such-arch"], "expected a known architecture"),
        (["llama", "--heads", 3, "--kv-heads", 2], "makes no model"),
        (["qwen3moe", "--experts", 2, "--experts-used", 4], "experts"),
        (["llama", "--type", "Q9_X"], "expected a tensor type"),
        (["llama", "--type", "Q8_K"], "expected a tensor type"),  # ggml's type of activations: nothing quantizes to it
        (["llama", "--context", 1 << 31], "expected a context of at most 2147483647"),
        (["llama", "--set", "no value"], "expected KEY=VALUE"),
        (["llama", "--set", 'hidden_act="tanh"'], "makes no model"),
        (["llama", "--set", "rms_norm_epz=1e-2"], "the nearest is rms_norm_eps"),
        (["llama", "--set", "gizmo=3"], "found 'gizmo'"),
        (["llama", "--set", "sliding_window=9", "--set", "slidin_window=9"], "found 'slidin_window'"),
        (["qwen3", "--set", "num_local_experts=4"], "found 'num_local_experts'"),  # another architecture's
        (["llama", "--set", 'num_hidden_layers="many"'], "makes no model"),
        (["llama", "--tokens", 300], "no longer than the model's context"),
        (["llama", "--width", 100000, "--vocab", 100000], "at most"),
    ],
)
def test_unfit_requests_are_told_and_leave_nothing(args: list[object], says: str, tmp_path: Path) -> None:
    arch, *rest = args
    code, output = synth(arch, tmp_path / "out", *rest)
    assert code == 2 and says in output, output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_there_is_replaced_but_not_another_checkpoint(tmp_path: Path) -> None:
    for seed in (1, 2):
        assert synth("llama", tmp_path / "same", "--seed", seed)[0] == 0
    assert synth("llama", tmp_path / "new", "--seed", 2)[0] == 0
    files = ("llama-F32.gguf", "checkpoint/model.safetensors", "checkpoint/config.json", "ids.json")
    assert all((tmp_path / "same" / f).read_bytes() == (tmp_path / "new" / f).read_bytes() for f in files)
    real = tmp_path / "real" / "checkpoint"
    real.mkdir(parents=True)
    (real / "config.json").write_text("{}")
    (real / "tokenizer.json").write_text("{}")
    code, output = synth("llama", tmp_path / "real")
    assert code == 2 and "holds tokenizer.json" in output and "another folder" in output
    assert (real / "config.json").read_text() == "{}" and not (tmp_path / "real" / "llama-F32.gguf").exists()


def test_ctrl_c_leaves_nothing_of_a_new_model_and_all_of_an_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffharness.pipeline.synthesizing._write", interrupted)
    out = tmp_path / "out"
    assert synth("llama", out)[0] == 130 and not out.exists()
    out.mkdir()
    (out / "mine").write_text("kept")
    assert synth("llama", out)[0] == 130
    assert [path.name for path in out.iterdir()] == ["mine"]
