"""The strict engine in slices of layers gives what it gives in one file: taps, logits, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffharness.captures import Capture
from diffharness.engine import slices
from diffharness.engine.models import EngineModel, OneFile
from diffharness.engine.slicing import SlicedStrict
from diffharness.engine.strict import strict_settings, write_strict
from diffharness.fixture import from_ids, load_fixture, save_fixture
from diffharness.pipeline import strict_way
from diffharness.pipeline.inputs import open_inputs
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.slice_replay import replay_slices
from diffharness.pipeline.strict_way import Limits
from diffharness.pipeline.timing import Timings
from diffharness.pipeline.work import Work
from diffharness.records import RunRecord
from diffharness.settings import configs_dir, load_tolerances, load_yaml
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import write_gguf
from diffharness.weights.names._map import Sizes
from diffharness.weights.synth import SynthSource
from tests.e2e.conftest import MakePair, Pair
from tests.e2e.runs import NATIVE, whole_run
from tests.engine.planted import planted_python

SETTINGS = strict_settings(NATIVE).changed(n_ubatch=16)  # several graphs for one chunk
LIMITS = load_yaml(Limits, configs_dir() / "strict.yaml")


def request(pair: Pair, **changes: object) -> RunRequest:
    given = RunRequest(pair.gguf, NATIVE, load_tolerances(), strict="slices", slice_layers=1)
    return replace(given, **changes)  # type: ignore[arg-type]


def small(n_bytes: int) -> Limits:
    return LIMITS.model_copy(update={"slice_bytes": LIMITS.slice_bytes.model_copy(update={"value": n_bytes})})


def captured(model: EngineModel, pair: Pair, out: Path, overrides: Sequence[str] = ()) -> Capture:
    return model.capture(SETTINGS, load_fixture(pair.fixture).chunks(), out, overrides=overrides).open()


def whole_and_sliced(pair: Pair, folder: Path, limits: Limits = LIMITS) -> tuple[Capture, Capture, SlicedStrict]:
    with open_gguf(pair.gguf) as artifact:
        way, parts = strict_way.choose(artifact, request(pair), folder, limits)
        assert way.way == "slices", way.reason
        sliced = SlicedStrict(artifact, parts, folder)
        whole = captured(OneFile(write_strict(artifact, artifact, folder / "whole.gguf")), pair, folder / "whole")
        return whole, captured(sliced, pair, folder / "slices"), sliced


@pytest.mark.parametrize(
    "case",
    ["llama", "llama-llama3", "mixtral", "qwen2", "qwen3moe", "gemma2", "gemma3", "gemma3-pattern", "gemma4",
     "gemma4-rotary-share"],
)  # fmt: skip
def test_every_tap_is_the_same(make_pair: MakePair, tmp_path: Path, case: str) -> None:
    whole, sliced, model = whole_and_sliced(make_pair(case), tmp_path)
    assert len(model.parts) > 1
    assert sliced.taps == whole.taps and {"token_embd", "output_norm", "logits"} <= set(whole.taps)
    for tap in whole.taps:
        expected, found = whole.read(tap), sliced.read(tap)
        assert np.square(found - expected).sum() <= 1e-10 * np.square(expected).sum(), tap
    assert {path.name for path in tmp_path.iterdir()} == {"whole.gguf", "whole", "slices"}, "slices leave no file"


# architecture, and the number of slices of 9 layers that are cut as finely as can be
OTHERS = [
    ("cohere2", 3),
    ("cohere2moe", 4),
    ("deepseek2", 9),  # dense layers first, latent attention
    ("exaone-moe", 7),
    ("gemma", 9),  # any input is scaled
    ("gpt-oss", 5),  # layers in turn slide, and a slice has one that does
    ("gpt2", 9),  # learned positions
    ("granite", 9),  # a scale of the embedding, by a key
    ("granite_swa", 4),
    ("llama4", 2),  # every fourth layer is not turned, every second routes
    ("lfm2", 3),  # short convolutions and attention
    ("mamba", 9),
    ("minicpm", 9),  # a scale that goes by the number of layers
    ("olmo2", 7),
    ("qwen2vl", 9),  # four positions for each token
    ("qwen3next", 2),
    ("qwen3vl", 9),  # inputs that are wider than the layers
    ("smollm3", 3),  # every fourth layer is not turned
]


@pytest.mark.parametrize(("arch", "n_slices"), OTHERS, ids=[arch for arch, _ in OTHERS])
def test_other_architectures(tmp_path: Path, arch: str, n_slices: int) -> None:
    source, gguf, fixture = SynthSource(arch, Sizes(n_layer=9)), tmp_path / "model.gguf", tmp_path / "ids.json"
    n_vocab = source.tensors["token_embd.weight"].shape[0]
    keys = {"general.architecture": arch, "tokenizer.ggml.model": "no_vocab", f"{arch}.vocab_size": n_vocab}
    write_gguf(gguf, source, type_of=lambda info: "F32", extra_metadata=keys)
    ids = np.random.default_rng(1).integers(0, n_vocab, 40)
    save_fixture(from_ids([int(each) for each in ids], name="random", chunk=40), fixture)
    whole, sliced, model = whole_and_sliced(Pair(gguf, tmp_path, fixture), tmp_path)
    assert len(model.parts) == n_slices
    # in a model's last layer lfm2's graph has another node in the place of this one
    hidden = {f"blk.{part.stop - 1}.ffn_in" for part in model.parts} if arch == "lfm2" else set()
    assert set(whole.taps) - hidden <= set(sliced.taps)
    for tap in set(whole.taps) & set(sliced.taps):
        expected, found = whole.read(tap), sliced.read(tap)
        assert np.square(found - expected).sum() <= 1e-10 * np.square(expected).sum(), tap


def test_the_head_in_parts(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair("llama")
    with open_gguf(pair.gguf) as artifact:
        head = artifact.tensors["token_embd.weight"].n_elements * 4
    whole, sliced, model = whole_and_sliced(pair, tmp_path, small(head * 2 // 3))
    assert sum(part.rows is not None for part in model.parts) > 2
    expected = whole.read("logits")
    assert np.square(sliced.read("logits") - expected).sum() <= 1e-10 * np.square(expected).sum()


def rows_of(record: RunRecord) -> dict[str, float]:
    return {row.tap: row.nmse_local for row in record.legs.graph.taps if row.nmse_local is not None}


def test_a_clean_run(make_pair: MakePair) -> None:
    whole, sliced = (whole_run(make_pair("gemma4"), strict=way, slice_layers=1) for way in ("whole", "slices"))
    for record in (whole, sliced):
        assert record.verdict.primary == "agree", [f.message for f in record.findings]
    assert sliced.legs.graph.strict is not None and sliced.legs.graph.strict.way == "slices"
    assert sliced.legs.graph.strict.slices == 3 and sliced.legs.graph.strict.layers == 2
    assert whole.legs.graph.strict is not None and whole.legs.graph.strict.way == "whole"
    assert rows_of(sliced) == pytest.approx(rows_of(whole), abs=1e-10)
    assert sliced.scores.engine["strict"].nll == pytest.approx(whole.scores.engine["strict"].nll, abs=1e-6)


FAULTS = [
    ("llama", "llama.attention.layer_norm_rms_epsilon=float:0.01", "blk.0.attn_norm"),
    ("qwen3moe", "qwen3moe.expert_used_count=int:2", "blk.0.moe_experts"),
    ("gemma3", "gemma3.rope.freq_base=float:10000", "blk.5.attn_q_rope"),
    ("gemma4", "gemma4.attention.sliding_window=int:4", "blk.0.attn_ctx"),
    ("gemma4", "gemma4.rope.freq_base=float:10000", "blk.2.attn_q_rope"),
    ("gemma4", "gemma4.final_logit_softcapping=float:30", "logits"),
]


@pytest.mark.parametrize(("case", "override", "tap"), FAULTS, ids=[f"{c}-{o.split('=')[0]}" for c, o, _ in FAULTS])
def test_a_fault_is_found_at_the_same_tap(make_pair: MakePair, case: str, override: str, tap: str) -> None:
    pair = make_pair(case)
    whole, sliced = (whole_run(pair, strict=way, slice_layers=1, overrides=(override,)) for way in ("whole", "slices"))
    assert sliced.legs.graph.strict is not None and sliced.legs.graph.strict.way == "slices"
    assert sliced.verdict.all == whole.verdict.all == ["engine.graph"], [f.message for f in sliced.findings]
    first, expected = sliced.first_divergence, whole.first_divergence
    assert first is not None and expected is not None and first.tap == expected.tap == tap
    assert first.token == expected.token and first.nmse_local == pytest.approx(expected.nmse_local, rel=1e-3)
    failing = {row.tap for row in sliced.legs.graph.taps if row.ok is False}
    assert failing == {row.tap for row in whole.legs.graph.taps if row.ok is False}
    confirmed = [pair.a for pair in sliced.legs.settings.pairs if pair.a.startswith("strict")]
    assert confirmed and sliced.legs.settings.status == "pass", "slices give the same without the callback"


def test_what_cannot_be_cut_is_run_whole(make_pair: MakePair) -> None:
    record = whole_run(make_pair("gemma4-e"), strict="slices")
    assert record.verdict.primary == "agree", [f.message for f in record.findings]
    way = record.legs.graph.strict
    assert way is not None and way.way == "whole" and "cannot be cut" in way.reason


def test_a_disk_that_is_too_small(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair("qwen3")
    with open_gguf(pair.gguf) as artifact:
        need = slices.f32_bytes(artifact)
    monkeypatch.setattr(strict_way, "free_disk", lambda folder: int(1.9 * need))
    record = whole_run(pair)
    way = record.legs.graph.strict
    assert way is not None and way.way == "slices" and "free disk" in way.reason
    assert record.verdict.primary == "agree"


def test_a_wrong_kernel_in_slices(make_pair: MakePair, tmp_path: Path) -> None:
    """Nodes are replayed slice by slice, under the layers' numbers in the whole model."""
    pair = make_pair("llama")
    whole, _, model = whole_and_sliced(pair, tmp_path)
    inputs = open_inputs(pair.gguf, None, str(pair.fixture), None, NATIVE)
    work, rows = Work(request(pair), inputs, tmp_path, Timings()), slice(0, 12)
    sliced = SlicedStrict(inputs.artifact, model.parts, tmp_path)
    clean = replay_slices(work, sliced, {0, 1, 2}, SETTINGS, whole.path, rows)
    assert clean.first is None and clean.leg.nodes_replayed > 20, clean.leg
    wrong = SETTINGS.changed(python=planted_python(tmp_path / "bin", "alter", node="Qcur-0", when="True"))
    found = replay_slices(work, sliced, {1, 2}, wrong, whole.path, rows)
    assert found.first is not None and (found.first.node, found.first.layer) == ("Qcur-1", 1)
    assert found.first.tensor == "blk.1.attn_q.weight" and "persists" in found.findings[0].evidence
    assert {row.node for row in found.leg.failing} == {"Qcur-1", "Qcur-2"} and found.layers == {1, 2}


def test_a_slice_that_dies(make_pair: MakePair, tmp_path: Path) -> None:
    """Its node is named, and settings are found that all slices survive."""
    when = "settings['name'] == 'strict' and settings['n_ubatch'] > 64"
    wrong = NATIVE.changed(python=planted_python(tmp_path / "bin", "abort", node="Qcur-0", when=when))
    record = whole_run(make_pair("llama"), strict="slices", slice_layers=1, engine=wrong)
    assert record.verdict.primary == "engine.crash", [f.message for f in record.findings]
    crash = next(f for f in record.findings if f.kind == "engine.crash")
    assert crash.evidence["survives"] == "n_ubatch 64" and crash.evidence["node"]["node"] == "Qcur-0"
    assert record.legs.graph.status == "pass" and "strict" in record.scores.engine


def test_an_override_that_cannot_be_cut(make_pair: MakePair, tmp_path: Path) -> None:
    with open_gguf(make_pair("gemma3").gguf) as artifact:
        asked = request(make_pair("gemma3"), overrides=("gemma3.attention.sliding_window_pattern=int:2",))
        way, parts = strict_way.choose(artifact, asked, tmp_path, LIMITS)
    assert (way.way, parts) == ("whole", []) and "override" in way.reason
