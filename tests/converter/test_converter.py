"""A fourth witness: the GGUF that llama.cpp's own converter makes of a checkpoint, against ours.

Metadata key by key, tensors bit by bit. Every difference must be one of those explained in
`EXPLAINED`; and every explanation must explain something, or it is stale.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.gguf_write import write_gguf
from tests.converter.source import llama_cpp_source
from tests.oracles import tiny, tiny_gemma

pytestmark = pytest.mark.converter

DRIVER = Path(__file__).with_name("driver.py")
ABSENT = "absent"


@dataclass(frozen=True)
class Explained:
    """A difference that is as it should be: in which keys, of which architectures, which, and why.

    `ours` and `theirs` are the values that it speaks of; None stands for any.
    """

    key: str
    why: str
    arch: str = "*"
    ours: Any = None
    theirs: Any = None

    def covers(self, arch: str, key: str, ours: Any, theirs: Any) -> bool:
        return (
            fnmatch.fnmatchcase(arch, self.arch)
            and fnmatch.fnmatchcase(key, self.key)
            and self.ours in (None, ours)
            and self.theirs in (None, theirs)
        )


EXPLAINED = (
    Explained("general.name", "the converter names the file after its folder", ours=ABSENT),
    Explained("general.size_label", "the converter counts parameters for display", ours=ABSENT),
    Explained("general.quantization_version", "says how quantized blocks are laid out; there are none", ours=ABSENT),
    Explained("tokenizer.ggml.model", "the tiny models have none: theirs says so, ours does not", ours=ABSENT),
    Explained("diffharness.*", "hyperparameters that GGUF has no key for; llama.cpp ignores them", theirs=ABSENT),
    Explained(
        "*.vocab_size",
        "the converter leaves it to the tokenizer; a file without one needs the key",
        arch="[qg]*",
        theirs=ABSENT,
    ),
    Explained(
        "llama.attention.sliding_window",
        "Mistral's window: llama.cpp's llama graph has none, so the converter drops it; the model has it",
        arch="llama",
        theirs=ABSENT,
    ),
    Explained(
        "qwen2.attention.sliding_window*",
        "Qwen 2's optional window (use_sliding_window): likewise",
        arch="qwen2",
        theirs=ABSENT,
    ),
    Explained(
        "qwen3moe.expert_weights_norm",
        "norm_topk_prob: llama.cpp's graph always makes the weights sum to one, so the converter drops it",
        arch="qwen3moe",
        theirs=ABSENT,
    ),
    Explained("gemma2.rope.freq_base", "the engine's default, which the converter leaves out", theirs=ABSENT),
    Explained(
        "*.attention.scale",
        "query_pre_attn_scalar other than the head size: the engine's graph knows only the released models'",
        arch="gemma[23]",
        theirs=ABSENT,
    ),
    Explained(
        "*.attention.sliding_window_pattern",
        "an order of layers other than the released models': the engine reads the key, the converter does not write it",
        arch="gemma[23]",
        theirs=ABSENT,
    ),
    Explained(
        "gemma4.final_logit_softcapping",
        "no cap in the config: without the key the engine would cap at 30, so we say 0",
        arch="gemma4",
        ours=("FLOAT32", 0.0),
        theirs=ABSENT,
    ),
)

CASES = [(module, case) for module in (tiny, tiny_gemma) for case in module.CASES]


def values(file: GgufFile) -> dict[str, tuple[str, Any]]:
    """Every key's type and value; floats as they are stored."""
    return {key: (file.kv_types[key], file.metadata[key]) for key in file.metadata}


def differences(arch: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, str, Any, Any]]:
    keys = sorted(ours.keys() | theirs.keys())
    rows = [(arch, key, ours.get(key, ABSENT), theirs.get(key, ABSENT)) for key in keys]
    return [row for row in rows if row[2] != row[3]]


@dataclass(frozen=True)
class Pair:
    """Both files of one case, and where they differ."""

    metadata: list[tuple[str, str, Any, Any]]
    tensors: list[str]
    n_tensors: int


def convert(checkpoint: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """llama.cpp's converter on `checkpoint`, in a process of its own."""
    stand_in_tokenizer(checkpoint)
    return subprocess.run(
        [sys.executable, str(DRIVER), str(llama_cpp_source()), str(checkpoint), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@functools.cache
def converted(module: Any, case: str, folder: Path) -> Pair:
    """Build the case's checkpoint, convert it both ways, and compare. Cached: two tests look at it."""
    checkpoint = folder / "checkpoint"
    module.build_checkpoint(case, checkpoint)
    theirs_path, ours_path = folder / "theirs.gguf", folder / "ours.gguf"
    write_gguf(ours_path, Checkpoint(checkpoint), type_of=lambda info: "F32")
    done = convert(checkpoint, theirs_path)
    assert done.returncode == 0, done.stderr[-4000:]
    with open_gguf(ours_path) as ours, open_gguf(theirs_path) as theirs:
        assert len(ours.tensors) > 5
        return Pair(
            metadata=differences(ours.arch, values(ours), values(theirs)),
            tensors=[*compare_tensors(ours, theirs)],
            n_tensors=len(ours.tensors),
        )


def stand_in_tokenizer(checkpoint: Path) -> None:
    """A tokenizer.json with a vocabulary of the model's size: the converter cuts Gemma's embedding by it."""
    config = json.loads((checkpoint / "config.json").read_text())
    n_vocab = config.get("text_config", config)["vocab_size"]
    tokenizer = {"model": {"vocab": {f"<{i}>": i for i in range(n_vocab)}}, "added_tokens": []}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))


def compare_tensors(ours: GgufFile, theirs: GgufFile) -> list[str]:
    """One line for each tensor that is not the same to the bit."""
    found = [f"{name}: only ours has it" for name in ours.tensors.keys() - theirs.tensors.keys()]
    found += [f"{name}: only theirs has it" for name in theirs.tensors.keys() - ours.tensors.keys()]
    for name in sorted(ours.tensors.keys() & theirs.tensors.keys()):
        a, b = ours.tensors[name], theirs.tensors[name]
        if (a.type, a.shape) != (b.type, b.shape):
            found.append(f"{name}: ours is {a.type} {a.shape}, theirs {b.type} {b.shape}")
        elif ours.raw(name).tobytes() != theirs.raw(name).tobytes():
            n = int((ours.read(name) != theirs.read(name)).sum())
            found.append(f"{name}: {n} of {a.n_elements} values differ")
    return found


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.cache(lambda index: tmp_path_factory.mktemp(f"case{index}"))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case for _, case in CASES])
def test_metadata_and_tensors_are_the_converters(index: int, folders: Any) -> None:
    pair = converted(*CASES[index], folders(index))
    unexplained = [row for row in pair.metadata if not any(rule.covers(*row) for rule in EXPLAINED)]
    assert unexplained == []
    assert pair.tensors == []


def test_every_explanation_explains_something(folders: Any) -> None:
    rows = [row for index in range(len(CASES)) for row in converted(*CASES[index], folders(index)).metadata]
    stale = [rule.key for rule in EXPLAINED if not any(rule.covers(*row) for row in rows)]
    assert stale == []
