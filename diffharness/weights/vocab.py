"""A checkpoint's `tokenizer.json` as GGUF's `tokenizer.ggml.*` keys.

llama.cpp has two kinds of vocabulary that matter here. Byte-level BPE (`gpt2`) needs the merges and
the name of one of the engine's own splitting rules (`tokenizer.ggml.pre`), which is found by comparing
the regular expressions of the tokenizer with those that the names stand for. SentencePiece-like BPE
(byte fallback, spaces as ▁) is `llama`, whose merges are told through scores, or where the engine has
a vocabulary for the architecture, that one, with merges. Anything else becomes a model without
vocabulary, on which ids can still be run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.checkpoint_files import read_json

# gguf's token types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# The engine's names of SentencePiece-like vocabularies: `llama`, but for architectures with their own.
_SENTENCEPIECE_MODELS = {"gemma4": "gemma4"}
_NO_MERGE_SCORE = -1e6  # below every merge: such a token is found whole or not at all

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CJK = "[一-龥ࠀ-一가-퟿]+"
# (expressions applied one after another, whole words win over merges) -> the engine's name
_PRE: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), False): "dbrx",
    ((rf"{_SHORT}|{_WORDS}|\p{{N}}|{_REST}",), False): "qwen2",
    ((_CASED % ("", "", ""),), True): "tekken",
    ((_CASED % (_SHORT + "?", _SHORT + "?", "{1,3}"),), False): "gpt-4o",
    ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"), False): "deepseek-coder",
}


@dataclass(frozen=True)
class Vocabulary:
    """GGUF keys of a vocabulary, and what could not be carried over faithfully, in words."""

    metadata: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def tokenizer_metadata(checkpoint_dir: str | Path, vocab_size: int, *, arch: str = "") -> dict[str, Any]:
    """`read_vocabulary(...).metadata`."""
    return read_vocabulary(checkpoint_dir, vocab_size, arch=arch).metadata


def read_vocabulary(checkpoint_dir: str | Path, vocab_size: int, *, arch: str = "") -> Vocabulary:
    """The vocabulary of the checkpoint in `checkpoint_dir` for an embedding of `vocab_size` rows.

    `arch` is `general.architecture`. Raises CheckpointError where tokenizer.json is not what its
    format says; without a tokenizer the result is a model without vocabulary.
    """
    folder = Path(checkpoint_dir)
    if not (folder / "tokenizer.json").is_file():
        return Vocabulary(no_vocabulary(), ["no tokenizer.json: written without a vocabulary"])
    tokenizer = read_json(folder / "tokenizer.json")
    try:
        return _read(folder, tokenizer, vocab_size, arch)
    except (KeyError, TypeError, AttributeError) as error:  # a part that is missing or of another JSON type
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: expected the format of the tokenizers library, found something else: "
            f"{type(error).__name__}: {error}",
            hint="download tokenizer.json again",
        ) from error


def _read(folder: Path, tokenizer: Mapping[str, Any], vocab_size: int, arch: str) -> Vocabulary:
    model = _object(tokenizer, "model")
    stages = list(_stages(tokenizer.get("pre_tokenizer"))) + list(_stages(tokenizer.get("normalizer")))
    kinds = {stage.get("type") for stage in stages}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        return Vocabulary(no_vocabulary(), [f"tokenizer model {model.get('type')!r}: written without a vocabulary"])
    notes: list[str] = []
    if "ByteLevel" in kinds:
        keys = _byte_level(tokenizer, model, notes)
        space = False
    elif model.get("byte_fallback") or "Metaspace" in kinds:
        keys = _sentencepiece(model, arch)
        space = True
    else:
        return Vocabulary(no_vocabulary(), ["neither byte-level nor byte-fallback BPE: written without a vocabulary"])
    keys |= _tokens(tokenizer, model, vocab_size, space, notes)
    keys |= _special(folder, tokenizer, vocab_size)
    if space:
        keys["tokenizer.ggml.add_space_prefix"] = _adds_space(stages)
    return Vocabulary(keys, notes)


def no_vocabulary() -> dict[str, Any]:
    """Keys of a model without vocabulary; the engine takes its size from `<arch>.vocab_size`."""
    return {"tokenizer.ggml.model": "no_vocab"}


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────


def _byte_level(tokenizer: Mapping[str, Any], model: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    patterns = tuple(_patterns(tokenizer.get("pre_tokenizer")))
    pre = _PRE.get((patterns, bool(model.get("ignore_merges")))) or _PRE.get((patterns, False))
    if pre is None:
        notes.append(f"the engine has no known name for the splitting rules {patterns}: written as 'default'")
    if any(s.get("add_prefix_space") for s in _stages(tokenizer.get("pre_tokenizer"))):
        notes.append("the tokenizer puts a space before the text, the engine does not")
    normalizers = [s.get("type") for s in _stages(tokenizer.get("normalizer")) if s.get("type") != "ByteLevel"]
    if normalizers:
        notes.append(f"the tokenizer normalizes ({', '.join(map(str, normalizers))}), the engine does not")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre or "default",
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
    }


def _sentencepiece(model: Mapping[str, Any], arch: str) -> dict[str, Any]:
    name = _SENTENCEPIECE_MODELS.get(arch, "llama")
    if name != "llama":
        return {
            "tokenizer.ggml.model": name,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
        }
    return {"tokenizer.ggml.model": name, "tokenizer.ggml.pre": "default"}


def _patterns(pre_tokenizer: Any) -> Iterator[str]:
    """The regular expressions of a byte-level tokenizer's stages, in order."""
    for stage in _stages(pre_tokenizer):
        kind = stage.get("type")
        if kind == "Split":
            pattern = stage.get("pattern") or {}
            yield pattern["Regex"] if "Regex" in pattern else re.escape(str(pattern.get("String")))
        elif kind == "Digits":
            yield r"\p{N}" if stage.get("individual_digits") else r"\p{N}+"
        elif kind == "ByteLevel":
            if stage.get("use_regex", True):
                yield _GPT2
        else:
            yield f"<{kind}>"


def _stages(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences flattened."""
    if isinstance(part, Mapping):
        inner = part.get("pretokenizers", part.get("normalizers"))
        if isinstance(inner, list):
            for item in inner:
                yield from _stages(item)
        else:
            yield part


def _adds_space(stages: list[Mapping[str, Any]]) -> bool:
    return any(
        stage.get("type") == "Prepend"
        or (
            stage.get("type") == "Metaspace"
            and (stage.get("prepend_scheme", "never") != "never" or stage.get("add_prefix_space", False))
        )
        for stage in stages
    )


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model.get("merges") or []:
        parts = merge.split(" ", 1) if isinstance(merge, str) else merge
        if len(parts) != 2:
            raise CheckpointError(f"tokenizer.json: expected merges of two parts, found {merge!r}")
        yield parts[0], parts[1]


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────


def _tokens(
    tokenizer: Mapping[str, Any], model: Mapping[str, Any], vocab_size: int, space: bool, notes: list[str]
) -> dict[str, Any]:
    """Tokens and types by id, gaps filled; scores where `space` says that ▁ stands for a space."""
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    beyond = 0
    for text, i in model["vocab"].items():
        if not 0 <= i < vocab_size:
            beyond += 1
            continue
        texts[i] = text
        types[i] = BYTE if space and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text) else NORMAL
    if model.get("unk_token") in model["vocab"] and model["vocab"][model["unk_token"]] < vocab_size:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    taken = set(texts)
    for added in tokenizer.get("added_tokens") or []:
        i, text = added["id"], added["content"]
        if not 0 <= i < vocab_size:
            beyond += 1
            continue
        if space and not added.get("special") and text.replace("▁", " ") not in taken:
            text = text.replace("▁", " ")  # the engine looks for these before it writes spaces as ▁
        taken.add(text)
        texts[i] = text
        if types[i] != UNKNOWN:
            types[i] = CONTROL if added.get("special") else USER_DEFINED
    if beyond:
        notes.append(f"{beyond} tokens have ids beyond the embedding's {vocab_size} rows and were left out")
    if len(set(texts)) != len(texts):
        raise CheckpointError("tokenizer.json: two ids have the same text, which llama.cpp does not load")
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    if space:
        keys["tokenizer.ggml.scores"] = _scores(model, texts)
    return keys


def _scores(model: Mapping[str, Any], texts: list[str]) -> list[float]:
    """-rank of the earliest merge that makes a token: the engine merges the highest score first."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[text]) if text in ranks else _NO_MERGE_SCORE for text in texts]


# ── special tokens ───────────────────────────────────────────────────────────────────────────────


def _special(folder: Path, tokenizer: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    ids: dict[str, int] = {**tokenizer["model"]["vocab"]}
    ids.update({added["content"]: added["id"] for added in tokenizer.get("added_tokens") or []})
    settings = _optional(folder / "tokenizer_config.json")
    config = _optional(folder / "config.json")
    first, last = _template(tokenizer.get("post_processor"))
    found: dict[str, int] = {}
    for key, kind in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        named = ids.get(text) if isinstance(text, str) else None
        number = named if named is not None else _first_int(config, f"{kind}_token_id")
        if number is not None and 0 <= number < vocab_size:
            found[key] = number
    if first is not None and "bos" not in found and ids.get(first, vocab_size) < vocab_size:
        found["bos"] = ids[first]
    keys: dict[str, Any] = {f"tokenizer.ggml.{key}_token_id": i for key, i in found.items()}
    adds = {"bos": first, "eos": last}
    for kind, text in adds.items():
        by_template = text is not None and ids.get(text) == found.get(kind)
        asked = kind in found and settings.get(f"add_{kind}_token") is True
        keys[f"tokenizer.ggml.add_{kind}_token"] = by_template or asked
    return keys


def _template(post_processor: Any) -> tuple[str | None, str | None]:
    """The special tokens that a tokenizer puts first and last of a single text."""
    if not isinstance(post_processor, Mapping):
        return None, None
    for processor in post_processor.get("processors", [post_processor]):
        single = processor.get("single") if processor.get("type") == "TemplateProcessing" else None
        if isinstance(single, list) and single:
            ends = [piece.get("SpecialToken", {}).get("id") for piece in (single[0], single[-1])]
            return ends[0], ends[1]
    return None, None


def _first_int(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None and isinstance(config.get("text_config"), Mapping):
        value = config["text_config"].get(key)
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _object(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"tokenizer.json: expected an object {key!r}, found {json.dumps(value)[:80]}")
    return value
