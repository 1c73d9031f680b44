"""The embedded model `fixtures/tiny-gemma4`: really trained, the same in every form, and sensitive to faults."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from diffharness import metrics
from diffharness.engine.runner import Engine
from diffharness.fixture import Fixture, load_fixture, read_text
from diffharness.reference.runner import Reference
from diffharness.settings import EngineSettings
from diffharness.tokenizer import CheckpointTokenizer
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.source import Float32Array, IntArray, Metadata, Overlay, TensorInfo, WeightSource

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDER = FIXTURES / "tiny-gemma4"
CHECKPOINT, ARTIFACT = FOLDER / "checkpoint", FOLDER / "tiny-gemma4-Q4_K_M.gguf"
HELD_OUT_SEED = 1_000_001  # as in make_tiny_gemma4.py


@pytest.fixture(scope="module")
def grammar() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_grammar", FIXTURES / "tiny_grammar.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def held_out() -> Fixture:
    """The beginning of it: four chunks."""
    return load_fixture(FOLDER / "heldout.json").first(2048)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineSettings(threads=1, time_limit_s=120))


def logits(source: WeightSource, held_out: Fixture) -> metrics.FloatArray:
    out = Reference(source).run(held_out.chunks())
    assert out is not None
    return np.asarray(out)


def perplexity(logits: metrics.FloatArray, held_out: Fixture) -> float:
    rows = held_out.scored_positions()
    return metrics.perplexity(metrics.nll_per_position(logits[rows], next_ids(held_out)))


def next_ids(held_out: Fixture) -> IntArray:
    return np.concatenate(held_out.chunks())[held_out.scored_positions() + 1]


@pytest.fixture(scope="module")
def clean(held_out: Fixture) -> float:
    """Perplexity of the checkpoint by the reference."""
    return perplexity(logits(Checkpoint(CHECKPOINT), held_out), held_out)


def test_everything_in_fixtures_is_small_enough_to_commit() -> None:
    files = [path for path in FIXTURES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert ARTIFACT in files
    assert sum(path.stat().st_size for path in files) <= 14_000_000


def test_held_out_text_is_what_the_grammar_makes(grammar: ModuleType) -> None:
    text = read_text(FOLDER / "heldout.txt")
    assert text == grammar.text(HELD_OUT_SEED, 24_000)
    assert load_fixture(FOLDER / "heldout.json").text == text
    assert grammar.text(1, 500) != grammar.text(2, 500)


def test_it_is_a_gemma4_with_all_features() -> None:
    metadata = Checkpoint(CHECKPOINT).metadata
    assert metadata["gemma4.block_count"] == 12
    assert list(metadata["gemma4.attention.sliding_window_pattern"]) == ([True] * 5 + [False]) * 2
    assert metadata["gemma4.final_logit_softcapping"] == 30.0
    tensors = Checkpoint(CHECKPOINT).tensors
    assert "output.weight" not in tensors  # tied
    assert [il for il in range(12) if f"blk.{il}.attn_v.weight" not in tensors] == [5, 11]  # K=V
    scalars = [Checkpoint(CHECKPOINT).read(f"blk.{il}.layer_output_scale.weight").item() for il in range(12)]
    assert np.ptp(scalars) > 0.3 and all(scalar != 1.0 for scalar in scalars)


def test_it_was_trained(clean: float, grammar: ModuleType, held_out: Fixture) -> None:
    training = CheckpointTokenizer(CHECKPOINT).encode(grammar.text(1, 300_000))
    counts = np.bincount(training, minlength=512) + 1.0
    unigram = float(np.exp(-np.log(counts / counts.sum())[next_ids(held_out)].mean()))
    assert clean < 6
    assert clean < unigram / 3


def test_transformers_computes_the_same(held_out: Fixture) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="eager")
    assert type(model).__name__ == "Gemma4ForCausalLM"
    with torch.inference_mode():
        theirs = torch.cat([model(torch.from_numpy(chunk)[None]).logits[0] for chunk in held_out.chunks()]).numpy()
    assert metrics.nmse(logits(Checkpoint(CHECKPOINT), held_out), theirs) <= 1e-10


def test_the_artifact_is_q4_k_m_throughout() -> None:
    artifact = open_gguf(ARTIFACT)
    types = {info.type for info in artifact.tensors.values() if len(info.shape) == 2}
    assert types == {"Q4_K", "Q6_K"}
    assert {info.type for info in artifact.tensors.values() if len(info.shape) == 1} == {"F32"}
    assert set(artifact.tensors) == set(Checkpoint(CHECKPOINT).tensors)


def test_the_artifact_loses_little(clean: float, held_out: Fixture) -> None:
    assert perplexity(logits(open_gguf(ARTIFACT), held_out), held_out) < clean * 1.1


def test_both_tokenizers_give_the_same_ids(engine: Engine) -> None:
    text = read_text(FOLDER / "heldout.txt")
    texts = [text, "It's 3.14 km, né?\n\n\t x  = [1, 22, 333];  ", "", "日本 – “quotes”"]
    ours = [CheckpointTokenizer(CHECKPOINT).encode(one) for one in texts]
    assert engine.tokenize(ARTIFACT, texts, parse_special=False) == ours
    assert tuple(ours[0]) == load_fixture(FOLDER / "heldout.json").ids


def test_llama_cpp_agrees_with_the_reference(engine: Engine, held_out: Fixture, tmp_path: Path) -> None:
    run = engine.capture(ARTIFACT, held_out.chunks(), tmp_path / "native.safetensors", taps=[])
    native = perplexity(run.open().read("logits"), held_out)
    assert native == pytest.approx(perplexity(logits(open_gguf(ARTIFACT), held_out), held_out), rel=0.02)


# -- a fault anywhere in the model must show ----------------------------------------------------------


class Changed:
    """A source with the values of some tensors replaced."""

    def __init__(self, base: WeightSource, suffix: str, value: float) -> None:
        self._base, self._suffix, self._value = base, suffix, np.float32(value)
        self.label, self.arch = base.label, base.arch
        self.metadata: Metadata = base.metadata
        self.tensors: dict[str, TensorInfo] = dict(base.tensors)

    def read(self, name: str) -> Float32Array:
        values = self._base.read(name)
        return np.full_like(values, self._value) if name.endswith(self._suffix) else values

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self._base.take(name, rows)


@pytest.mark.parametrize(
    ("key", "value", "costs"),
    [("gemma4.rope.freq_base_swa", 1_000_000.0, 1.1), ("gemma4.attention.sliding_window", 512, 1.2)],
)
def test_a_wrong_key_costs_perplexity(key: str, value: float, costs: float, clean: float, held_out: Fixture) -> None:
    checkpoint = Checkpoint(CHECKPOINT)
    assert key in checkpoint.metadata
    wrong = Overlay(checkpoint, metadata={**checkpoint.metadata, key: value})
    assert perplexity(logits(wrong, held_out), held_out) > clean * costs


@pytest.mark.parametrize(
    ("suffix", "costs"),
    [("layer_output_scale.weight", 1.1), ("post_attention_norm.weight", 3), ("post_ffw_norm.weight", 2)],
)
def test_lost_gains_cost_perplexity(suffix: str, costs: float, clean: float, held_out: Fixture) -> None:
    wrong = Changed(Checkpoint(CHECKPOINT), suffix, 1.0)
    assert perplexity(logits(wrong, held_out), held_out) > clean * costs
