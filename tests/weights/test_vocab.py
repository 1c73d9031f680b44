"""Vocabularies: llama.cpp, given what we write, splits a text into the ids that `tokenizers` gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from diffharness.errors import CheckpointError
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import write_tensors
from diffharness.weights.vocab import _PRE, read_vocabulary, tokenizer_metadata

TEXT = (
    "The harness doesn't guess: it measures. On 14 March 2021, at 09:30, forty-two probes (each of 3.5 kg) were sent "
    'down the shaft;\n\tonly 39 came back.   "Why?" asked Ines — nobody knew.\n\n'
    "def area(r):\n    return 3.14159 * r ** 2  # m²\n\nÜber den Wolken… naïve café, 12345678 + 90 = ?  "
    "I'LL see, they've gone.\n"
)
PATTERNS = {name: (patterns, whole) for (patterns, whole), name in _PRE.items()}


def train(tokenizer: Tokenizer, **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=["<s>", "</s>"], **options)
    tokenizer.train_from_iterator([TEXT, TEXT.lower(), TEXT.upper()], trainer)
    return tokenizer


def byte_level(patterns: tuple[str, ...], ignore_merges: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    stages: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*stages, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(spaces: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if isinstance(spaces, pre_tokenizers.PreTokenizer):
        tokenizer.pre_tokenizer = spaces
    else:
        tokenizer.normalizer = spaces
        # The engine's Gemma 4 vocabulary has no token with a newline and something else; nor have these.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    alphabet = sorted(set(TEXT) - set("²Ü"))  # those left out fall back to bytes
    train(tokenizer, initial_alphabet=alphabet, limit_alphabet=len(alphabet))
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for text in ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]:
        vocab.setdefault(text, len(vocab))
    return Tokenizer.from_str(json.dumps(state))


def save(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class EngineVocabulary:
    """llama.cpp's tokenizer of a file that has nothing but a vocabulary."""

    def __init__(self, path: Path, keys: dict[str, Any], arch: str = "llama") -> None:
        kvs = {"general.architecture": arch, **keys}
        write_tensors(path, {k: encode_value(k, v) for k, v in kvs.items()}, [])
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def encode(self, text: str, special: bool = False) -> list[int]:
        raw = text.encode()
        out = (llama_cpp.llama_token * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), out, len(out), special, True)
        assert n >= 0
        return list(out[:n])

    def close(self) -> None:
        llama_cpp.llama_model_free(self.model)


def assert_engine_agrees(folder: Path, tokenizer: Tokenizer, arch: str = "llama", special: bool = False) -> None:
    vocabulary = read_vocabulary(folder, tokenizer.get_vocab_size(), arch=arch)
    assert vocabulary.notes == []
    engine = EngineVocabulary(folder / "vocab.gguf", vocabulary.metadata, arch)
    try:
        want = tokenizer.encode(TEXT, add_special_tokens=special).ids
        assert engine.encode(TEXT, special) == want
        assert len(want) > 50
    finally:
        engine.close()


@pytest.mark.parametrize("name", PATTERNS)
def test_byte_level_splitting_rules(tmp_path: Path, name: str) -> None:
    tokenizer = byte_level(*PATTERNS[name])
    folder = save(tmp_path / "hf", tokenizer)
    assert tokenizer_metadata(folder, tokenizer.get_vocab_size())["tokenizer.ggml.pre"] == name
    assert_engine_agrees(folder, tokenizer)


def test_the_stages_of_the_tokenizers_library_are_known_by_their_rules(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    train(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    folder = save(tmp_path / "hf", tokenizer)
    assert tokenizer_metadata(folder, tokenizer.get_vocab_size())["tokenizer.ggml.pre"] == "smollm"
    assert_engine_agrees(folder, tokenizer)


def test_bos_and_eos_of_the_template_are_added(tmp_path: Path) -> None:
    tokenizer = byte_level(*PATTERNS["gpt-2"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    folder = save(tmp_path / "hf", tokenizer, bos_token="<s>", eos_token={"content": "</s>"})
    keys = tokenizer_metadata(folder, tokenizer.get_vocab_size())
    assert keys["tokenizer.ggml.bos_token_id"] == 0 and keys["tokenizer.ggml.eos_token_id"] == 1
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_eos_token"] is True
    assert_engine_agrees(folder, tokenizer, special=True)


def test_a_model_that_adds_nothing_says_so(tmp_path: Path) -> None:
    tokenizer = byte_level(*PATTERNS["llama-bpe"])  # a rule under which llama.cpp would add a BOS by itself
    folder = save(tmp_path / "hf", tokenizer, bos_token="<s>")
    assert tokenizer_metadata(folder, 420)["tokenizer.ggml.add_bos_token"] is False
    assert_engine_agrees(folder, tokenizer, special=True)


def test_ids_of_config_json_are_used_where_no_token_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", byte_level(*PATTERNS["gpt-2"]), add_bos_token=True)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": 9999}))
    keys = tokenizer_metadata(folder, 420)
    assert keys["tokenizer.ggml.bos_token_id"] == 0 and keys["tokenizer.ggml.eos_token_id"] == 1
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.ggml.padding_token_id" not in keys


def test_sentencepiece_with_a_space_before_the_text(tmp_path: Path) -> None:
    tokenizer = sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    folder = save(tmp_path / "hf", tokenizer)
    keys = tokenizer_metadata(folder, tokenizer.get_vocab_size())
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"] is True
    assert_engine_agrees(folder, tokenizer)


@pytest.mark.parametrize(("arch", "kind"), [("gemma3", "llama"), ("gemma4", "gemma4")])
def test_sentencepiece_without(tmp_path: Path, arch: str, kind: str) -> None:
    tokenizer = sentencepiece(normalizers.Replace(" ", "▁"))
    folder = save(tmp_path / "hf", tokenizer, bos_token="<s>")
    keys = tokenizer_metadata(folder, tokenizer.get_vocab_size(), arch=arch)
    assert keys["tokenizer.ggml.model"] == kind and keys["tokenizer.ggml.add_space_prefix"] is False
    assert_engine_agrees(folder, tokenizer, arch)


def test_added_tokens_and_gaps(tmp_path: Path) -> None:
    tokenizer = byte_level(*PATTERNS["gpt-2"])
    n = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("harness", normalized=False)])
    folder = save(tmp_path / "hf", tokenizer)
    keys = tokenizer_metadata(folder, n + 4)
    assert keys["tokenizer.ggml.tokens"][n:] == ["<|end|>", "harness", f"[PAD{n + 2}]", f"[PAD{n + 3}]"]
    assert keys["tokenizer.ggml.token_type"][n:] == [3, 4, 5, 5]
    engine = EngineVocabulary(tmp_path / "vocab.gguf", keys)
    assert engine.encode(TEXT + "<|end|>") == tokenizer.encode(TEXT + "<|end|>").ids
    engine.close()
    short = read_vocabulary(folder, n + 1)
    assert len(short.metadata["tokenizer.ggml.tokens"]) == n + 1
    assert short.notes == [f"1 tokens have ids beyond the embedding's {n + 1} rows and were left out"]


def test_unknown_splitting_rules_are_default_and_told(tmp_path: Path) -> None:
    tokenizer = byte_level((r"\S+|\s+",), False)
    tokenizer.normalizer = normalizers.NFC()
    vocabulary = read_vocabulary(save(tmp_path / "hf", tokenizer), 420)
    assert vocabulary.metadata["tokenizer.ggml.pre"] == "default"
    assert "no known name for the splitting rules" in vocabulary.notes[0] and "NFC" in vocabulary.notes[1]


def test_without_a_tokenizer_the_engine_still_loads_and_runs_ids(tmp_path: Path) -> None:
    from diffharness.weights.checkpoint import Checkpoint
    from diffharness.weights.checkpoint_write import write_checkpoint
    from diffharness.weights.convert import checkpoint_to_gguf
    from tests.weights.tiny import LLAMA_CONFIG, random_source

    write_checkpoint(tmp_path / "hf", random_source(LLAMA_CONFIG))
    checkpoint_to_gguf(Checkpoint(tmp_path / "hf"), tmp_path / "a.gguf")
    model = llama_cpp.llama_model_load_from_file(
        str(tmp_path / "a.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    assert model
    assert llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)) == 80
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 32
    context = llama_cpp.llama_init_from_model(model, params)
    ids = (llama_cpp.llama_token * 3)(5, 6, 7)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, 3)) == 0
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(80,))
    assert np.isfinite(logits).all() and logits.std() > 0
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram"])
def test_other_kinds_become_no_vocabulary_and_tell(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": {}}}))
    vocabulary = read_vocabulary(tmp_path, 10)
    assert vocabulary.metadata == {"tokenizer.ggml.model": "no_vocab"}
    assert kind in vocabulary.notes[0]


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "{}",
        '{"model": []}',
        '{"model": {"type": "BPE", "vocab": {"a": "b"}}, "pre_tokenizer": {"type": "ByteLevel"}}',
        '{"model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}, "pre_tokenizer": {"type": "ByteLevel"}}',
        '{"model": {"type": "BPE", "vocab": {}}, "added_tokens": [{}], "pre_tokenizer": {"type": "ByteLevel"}}',
        '{"model": {"type": "BPE", "vocab": {}}, "added_tokens": 7, "pre_tokenizer": {"type": "ByteLevel"}}',
    ],
)
def test_a_broken_tokenizer_is_a_checkpoint_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_vocabulary(tmp_path, 10)
