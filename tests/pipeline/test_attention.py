"""Attention health of the embedded model: clean, and with faults planted in what makes the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from diffharness.engine.quantizer import Quantizer
from diffharness.fixture import Fixture, load_fixture
from diffharness.forensics.control import Control
from diffharness.pipeline import reference_runs
from diffharness.pipeline.attention import Baseline, Watching, judged, ranges_of
from diffharness.pipeline.reference_runs import Precision, shape_of
from diffharness.records.attention import AttentionHealth
from diffharness.reference.runner import Reference
from diffharness.settings import data_dir, load_engine, load_tolerances
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.source import Float32Array, IntArray, TensorInfo, WeightSource

EMBEDDED = data_dir("fixtures") / "tiny-gemma4"
Change = Callable[[str, Float32Array], Float32Array]
Judge = Callable[[WeightSource], AttentionHealth]


class Changed:
    """A source with some tensors, or keys, changed."""

    def __init__(
        self, base: WeightSource, change: Change = lambda _, x: x, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self._base, self._change = base, change
        self.label, self.arch, self.metadata = base.label, base.arch, dict(base.metadata) | dict(metadata or {})

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._base.tensors

    def read(self, name: str) -> Float32Array:
        return self._change(name, np.array(self._base.read(name)))

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return self.read(name)[rows]


@pytest.fixture(scope="module")
def clean() -> Iterator[GgufFile]:
    with open_gguf(EMBEDDED / "tiny-gemma4-Q4_K_M.gguf") as artifact:
        yield artifact


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return load_fixture(EMBEDDED / "heldout.json").rechunked(256).first(256)


@pytest.fixture(scope="module")
def baseline(fixture: Fixture) -> Iterator[Baseline]:
    with Baseline(Checkpoint(EMBEDDED / "checkpoint"), fixture, Precision(), n_ubatch=128) as made:
        yield made


@pytest.fixture(scope="module")
def health(baseline: Baseline, clean: GgufFile) -> Judge:
    """Judged with the clean artifact as control: it is as good as a fresh quantization, and quick to read."""
    control = baseline.beside(clean)
    return lambda artifact: baseline.judge(baseline.beside(artifact), control, load_tolerances())


def multiplied(by: float, *names: str) -> Change:
    return lambda name, x: x * np.float32(by) if name in names else x


def test_a_clean_artifact_has_no_finding_with_and_without_a_control(baseline: Baseline, clean: GgufFile) -> None:
    checkpoint = Checkpoint(EMBEDDED / "checkpoint")
    with Quantizer(load_engine("native").changed(threads=1)) as quantizer:
        artifact = baseline.beside(clean)
        for control in (None, baseline.beside(Control(checkpoint, clean, quantizer.quantize))):
            found = baseline.judge(artifact, control, load_tolerances())
            assert (found.changed, found.findings) == ([], [])
            assert found.ranges == [(1, 16), (16, 64), (64, 128), (128, 256)]
            assert (found.control is None) == (control is None)


def test_noise_in_queries_and_keys_flattens_their_layers(health: Judge, clean: GgufFile) -> None:
    generator = np.random.default_rng(0)
    hit = {f"blk.{il}.{name}.weight" for il in (2, 3, 4) for name in ("attn_q", "attn_k")}

    def noisy(name: str, x: Float32Array) -> Float32Array:
        return (x + generator.standard_normal(x.shape) * 3 * x.std()).astype(np.float32) if name in hit else x

    flattened = health(Changed(clean, noisy)).findings[0]
    assert flattened.evidence["how"] == "flattened" and flattened.evidence["layers_by_own_weights"] == [2, 3, 4]


@pytest.mark.parametrize(("by", "how"), [(0.3, "flattened"), (3.0, "collapsed")])
def test_scaled_queries(health: Judge, clean: GgufFile, by: float, how: str) -> None:
    found = health(Changed(clean, multiplied(by, "blk.5.attn_q_norm.weight")))
    local = [head for head in found.changed if "local" in head.streams]
    assert {(head.layer, head.how) for head in local} == {(5, how)} and len(local) == 4
    words = {"flattened": "tends to uniform", "collapsed": "collapses onto few keys"}[how]
    assert any(words in finding.message for finding in found.findings)


def test_one_head_only(health: Judge, clean: GgufFile) -> None:
    def second_head(name: str, x: Float32Array) -> Float32Array:
        if name == "blk.6.attn_q.weight":
            rows = len(x) // 4
            x[rows : 2 * rows] = np.random.default_rng(0).standard_normal((rows, x.shape[1])) * x.std()
        return x

    found = health(Changed(clean, second_head))
    assert {(head.layer, head.head) for head in found.changed if "local" in head.streams} == {(6, 1)}


def test_a_wrong_rope_base_touches_the_layers_that_use_it(health: Judge, clean: GgufFile) -> None:
    found = health(Changed(clean, metadata={"gemma4.rope.freq_base": 100.0}))
    local = {head.layer for head in found.changed if "local" in head.streams}
    assert local and local <= {5, 11}  # the global ones


def test_damage_before_attention_is_not_laid_at_its_door(health: Judge, clean: GgufFile) -> None:
    found = health(Changed(clean, multiplied(0.0, "blk.4.ffn_down.weight")))
    assert found.changed and all(head.streams == ["own"] and head.layer > 4 for head in found.changed)


def test_it_rides_along_passes_that_are_made_anyway(
    health: Judge, clean: GgufFile, fixture: Fixture, tmp_path: Any
) -> None:
    checkpoint, precision = Checkpoint(EMBEDDED / "checkpoint"), Precision()
    artifact = Changed(clean, multiplied(0.3, "blk.5.attn_q_norm.weight"))
    shape = shape_of(Reference(checkpoint).model, fixture, 128)
    watched = [Watching(shape) for _ in range(3)]
    capture = reference_runs.captured(
        checkpoint, fixture, precision, tmp_path / "c.safetensors", on_attention=watched[0]
    )
    for source, watching in ((artifact, watched[1]), (clean, watched[2])):
        reference_runs.against_capture(source, capture, fixture, precision, on_attention=watching)
    found = judged(watched[0], watched[1], watched[2], shape, load_tolerances())
    alone = health(artifact)
    assert [(h.layer, h.head, h.streams) for h in found.changed] == [
        (h.layer, h.head, h.streams) for h in alone.changed
    ]
    assert found.artifact == alone.artifact and found.checkpoint == alone.checkpoint


def test_ranges_double_past_a_thousand_positions(clean: GgufFile) -> None:
    long = load_fixture(EMBEDDED / "heldout.json").rechunked(4096)
    shape = shape_of(Reference(clean).model, long, 512)
    assert ranges_of(shape)[-3:] == [(512, 1024), (1024, 2048), (2048, 4096)]
