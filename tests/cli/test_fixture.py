"""`diffharness fixture`: what it prints where, and the exit code of each outcome."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import typer
from click.testing import Result
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from typer.testing import CliRunner

from diffharness.cli import _tokenizers
from diffharness.cli import fixture as command
from diffharness.cli.main import Commands
from diffharness.fixture import Fixture, from_ids, load_fixture, save_fixture, text_path

TEXT = "one two three two one — two\nthree one two three one two"
WORDS = ["<s>", "one", "two", "three", "—", "<unk>"]

root = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
root.add_typer(command.app)
root.command("other")(lambda: None)


def call(*args: object) -> Result:
    return CliRunner().invoke(root, ["fixture", *map(str, args)])


def words(text: str) -> list[int]:
    """What the tokenizers below make of a text: BOS, then words."""
    return [0, *(WORDS.index(word) for word in text.split())]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder whose tokenizer.json knows six words and adds BOS."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF with the same vocabulary; the engine's part is played by `words`."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(_tokenizers, "engine_ids", lambda path, texts: [words(t) for t in texts])
    return path


@pytest.fixture
def made(text: Path, checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "story.json"
    assert call("new", text, "--checkpoint", checkpoint, "--chunk", 6, "--out", path).exit_code == 0
    return path


# -- new --------------------------------------------------------------------------------------------------


def test_new_with_a_checkpoint(made: Path, checkpoint: Path) -> None:
    fixture = load_fixture(made)
    assert list(fixture.ids) == words(TEXT)
    assert (fixture.name, fixture.text, fixture.chunk) == ("story", TEXT, 6)
    assert (fixture.adds_bos, fixture.bos_id, fixture.tokenizer_kind) == (True, 0, "tokenizer.json")
    assert fixture.provenance["tokenizer"] == "model/tokenizer.json"
    assert str(checkpoint.parent) not in made.read_text()  # no paths of this machine


def test_new_with_a_gguf(text: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.json"
    result = call("new", text, "--model", model, "--out", out, "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ids"] == len(words(TEXT))
    fixture = load_fixture(out)
    assert list(fixture.ids) == words(TEXT)
    assert (fixture.tokenizer_kind, fixture.adds_bos, fixture.provenance["tokenizer"]) == ("gguf", True, "model.gguf")


def test_new_without_out_prints_the_fixture_and_nothing_else(text: Path, checkpoint: Path) -> None:
    result = call("new", text, "--checkpoint", checkpoint)
    assert result.exit_code == 0
    assert list(Fixture.model_validate_json(result.stdout).ids) == words(TEXT)


def test_new_needs_one_tokenizer(text: Path, checkpoint: Path, model: Path) -> None:
    neither, both = call("new", text), call("new", text, "--checkpoint", checkpoint, "--model", model)
    assert (neither.exit_code, both.exit_code) == (2, 2)
    assert "found neither" in neither.stderr and "hint: give --checkpoint DIR or --model GGUF" in neither.stderr
    assert "found both" in both.stderr


def test_new_does_not_write_over_its_text(text: Path, model: Path) -> None:
    before = text.read_text()
    result = call("new", text, "--model", model, "--out", text)
    assert result.exit_code == 2 and "is the text itself" in result.stderr and text.read_text() == before


def test_new_refuses_what_is_no_text(tmp_path: Path, checkpoint: Path, made: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "word.txt").write_text("one")
    for name, message in [
        ("empty.txt", "is empty"),
        ("latin.txt", "not UTF-8"),
        ("word.txt", "no position is scored"),
        ("absent.txt", "neither a file nor a shipped name"),
        (made.name, "expected a text"),
    ]:
        result = call("new", tmp_path / name, "--checkpoint", checkpoint)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr


def test_new_writes_nothing_where_it_cannot(text: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = call("new", text, "--checkpoint", checkpoint, "--out", tmp_path / "no" / "x.json")
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert call("new", text, "--checkpoint", checkpoint, "--json", "-").exit_code == 2  # both want standard output
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_without_a_tokenizer(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = call("new", text, "--model", path)
    assert result.exit_code == 2
    assert "has no tokenizer" in result.stderr


# -- verify -----------------------------------------------------------------------------------------------


def test_verify_agrees_with_both(made: Path, checkpoint: Path, model: Path) -> None:
    result = call("verify", made, "--checkpoint", checkpoint, "--model", model)
    assert result.exit_code == 0, result.output
    assert "verdict: agree" in result.stdout
    record = json.loads(call("verify", made, "--checkpoint", checkpoint, "--model", model, "--json", "-").stdout)
    assert [(c["kind"], c["same"]) for c in record["checks"]] == [("tokenizer.json", True), ("gguf", True)]


def test_verify_prints_the_first_difference(
    made: Path, checkpoint: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = words(TEXT)
    other[3] = 1
    monkeypatch.setattr(_tokenizers, "engine_ids", lambda path, texts: [other for _ in texts])
    result = call("verify", made, "--checkpoint", checkpoint, "--model", model)
    assert result.exit_code == 1
    assert "verdict: tokens" in result.stdout
    assert "model/tokenizer.json: the same 14 ids" in result.stdout
    assert "model.gguf: differs at position 3 of 14 (fixture) and 14 (tokenizer)" in result.stdout
    assert "fixture    3 'three' 'two'" in result.stdout
    assert "tokenizer  1 'one' 'two'" in result.stdout
    checks = json.loads(call("verify", made, "--model", model, "--json", "-").stdout)["checks"]
    assert checks[0]["first_difference"]["position"] == 3


def test_verify_of_a_beginning_compares_the_beginning(made: Path, checkpoint: Path, tmp_path: Path) -> None:
    save_fixture(load_fixture(made).first(5), tmp_path / "short.json")
    assert call("verify", tmp_path / "short.json", "--checkpoint", checkpoint).exit_code == 0


def test_verify_says_that_another_file_made_it(made: Path, checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    result = call("verify", made, "--checkpoint", checkpoint)
    assert result.exit_code == 0
    assert "made with another file" in result.stdout


def test_verify_of_bare_ids_is_inconclusive(model: Path, tmp_path: Path) -> None:
    save_fixture(from_ids([1, 2, 3, 4]), tmp_path / "ids.json")
    save_fixture(from_ids([1, 2, 3, 40]), tmp_path / "outside.json")
    inside = call("verify", tmp_path / "ids.json", "--model", model)
    assert inside.exit_code == 125
    assert "nothing to tokenize" in inside.stderr
    outside = call("verify", tmp_path / "outside.json", "--model", model)
    assert outside.exit_code == 2
    assert "id 40 at position 3" in outside.stderr


def test_verify_needs_a_tokenizer_and_a_fixture(made: Path, text: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert call("verify", made).exit_code == 2
    assert "not JSON" in call("verify", text, "--checkpoint", checkpoint).stderr
    missing = call("verify", made, "--checkpoint", tmp_path / "nowhere")
    assert missing.exit_code == 2
    assert "cannot read the tokenizer" in missing.stderr


def test_an_edited_text_is_refused(made: Path, checkpoint: Path) -> None:
    data = json.loads(made.read_text())
    data["text"] += " two"
    made.write_text(json.dumps(data))
    result = call("verify", made, "--checkpoint", checkpoint)
    assert result.exit_code == 2
    assert "the text was edited" in result.stderr


# -- with llama.cpp ---------------------------------------------------------------------------------------


@pytest.fixture
def byte_level(tmp_path: Path) -> tuple[Path, Path]:
    """A GPT-2 style BPE trained on the shipped text, as a checkpoint's tokenizer and as a GGUF's vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train([str(text_path("english"))], trainer)
    folder = tmp_path / "bytes"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]

    path = tmp_path / "bytes.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in [
        (writer.add_context_length, 64), (writer.add_embedding_length, 32), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 32), (writer.add_head_count, 2), (writer.add_layer_norm_rms_eps, 1e-5),
    ]:  # fmt: skip
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())])
    writer.add_token_types([gguf.TokenType.NORMAL] * tokenizer.get_vocab_size())
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, path


def test_tokenizers_and_llama_cpp_agree_on_the_shipped_text(byte_level: tuple[Path, Path], tmp_path: Path) -> None:
    folder, path = byte_level
    for source in (("--checkpoint", folder), ("--model", path)):
        made = call("new", "english", *source, "--out", tmp_path / "english.json")
        assert made.exit_code == 0, made.stderr
        checked = call("verify", tmp_path / "english.json", "--checkpoint", folder, "--model", path)
        assert checked.exit_code == 0, checked.output
    assert load_fixture(tmp_path / "english.json").tokenizer_kind == "gguf"


# -- show -------------------------------------------------------------------------------------------------


def test_show(made: Path) -> None:
    result = call("show", made)
    assert result.exit_code == 0
    for part in (
        "story",
        "14, SHA-256",
        "3 of 6 tokens, the last of 2",
        "14 tokens evaluated",
        "4 positions",
        "id 0",
        "one two three",
    ):
        assert part in result.stdout
    about = json.loads(call("show", made, "--json", "-").stdout)
    assert (about["ids"], about["chunk_lengths"], about["scored"]) == (14, [6, 6, 2], 4)


def test_show_of_bare_ids(tmp_path: Path) -> None:
    save_fixture(from_ids(range(9)), tmp_path / "ids.json")
    result = call("show", tmp_path / "ids.json", "--json", tmp_path / "s.json")
    assert result.exit_code == 0
    assert "none added" in result.stdout
    assert json.loads((tmp_path / "s.json").read_text())["text_sha256"] is None
