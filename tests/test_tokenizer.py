"""The checkpoint's tokenizer, on a tiny one trained here, and the identity of a GGUF's vocabulary."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from diffharness import tokenizer as tk
from diffharness.errors import CheckpointError
from diffharness.fixture import from_text
from diffharness.tokenizer import CheckpointTokenizer, gguf_tokenizer_sha256

TEXT = "The ferry left the quay, and the quay was left to the gulls. “Late again,” said the café."


def train(folder: Path, *, bos: bool) -> Path:
    """A byte-level BPE of 300 tokens, with `<s>` before a text if `bos`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("with") / "model", bos=True)


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("without") / "model", bos=False)


def test_the_whole_text_is_encoded_whatever_the_file_says_of_truncation_and_padding(with_bos: Path) -> None:
    tokenizer = CheckpointTokenizer(with_bos)
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 16
    assert ids[0] == 0 and 0 not in ids[1:]
    raw = Tokenizer.from_file(str(with_bos / "tokenizer.json"))
    raw.no_padding()
    assert raw.decode(ids) == TEXT


def test_special_tokens_in_the_text_are_text(with_bos: Path) -> None:
    ids = CheckpointTokenizer(with_bos).encode("a<s>b")
    assert ids[0] == 0
    assert 0 not in ids[1:]


@pytest.mark.parametrize("bos", [True, False])
def test_a_fixture_knows_whether_the_tokenizer_adds_bos(bos: bool, with_bos: Path, without_bos: Path) -> None:
    tokenizer = CheckpointTokenizer(with_bos if bos else without_bos)
    fixture = from_text(TEXT, tokenizer.encode, name="t", chunk=8)
    assert fixture.adds_bos is bos
    assert fixture.bos_id == (0 if bos else None)
    firsts = [int(chunk[0]) for chunk in fixture.chunks()]
    assert (set(firsts) == {0}) is bos
    fixture.check_vocab(tokenizer.n_vocab)


def test_identity_and_pieces(with_bos: Path) -> None:
    tokenizer = CheckpointTokenizer(with_bos)
    data = (with_bos / "tokenizer.json").read_bytes()
    assert tokenizer.sha256 == hashlib.sha256(data).hexdigest()
    assert tokenizer.label == "model/tokenizer.json"
    assert CheckpointTokenizer(with_bos / "tokenizer.json").sha256 == tokenizer.sha256
    assert tokenizer.n_vocab == 300
    assert tokenizer.piece(0) == "<s>"
    assert tokenizer.piece(300) == "<id 300>"


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "Nothing"}}'])
def test_a_malformed_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        CheckpointTokenizer(tmp_path)


def test_a_missing_or_huge_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        CheckpointTokenizer(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(tk.MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(CheckpointError, match="at most"):
        CheckpointTokenizer(tmp_path)


def test_the_identity_of_a_gguf_vocabulary() -> None:
    keys = {
        "general.name": "x",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "é"],
        "tokenizer.ggml.scores": [0.5, -1.0],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "…",
    }
    digest = gguf_tokenizer_sha256(keys)
    assert digest is not None
    same = [
        {**keys, "general.name": "y", "tokenizer.chat_template": "other"},
        dict(reversed(keys.items())),
        {**keys, "tokenizer.ggml.scores": np.array([0.5, -1.0])},
    ]
    assert [gguf_tokenizer_sha256(k) for k in same] == [digest] * 3
    others = [
        {**keys, "tokenizer.ggml.tokens": ["é", "a"]},
        {**keys, "tokenizer.ggml.add_bos_token": False},
        {k: v for k, v in keys.items() if k != "tokenizer.ggml.scores"},
    ]
    assert len({digest, *(gguf_tokenizer_sha256(k) for k in others)}) == 4
    assert gguf_tokenizer_sha256({"tokenizer.ggml.model": "none"}) is None
