"""Real models, quantized anew and damaged in ten ways: `inspect` clears the clean files and names what was done to the
others.

The models' own dequantized weights, written as a checkpoint, are what the files claim to come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from bench.model import gemma3_270m, smollm2
from diffharness.damage import Options
from diffharness.engine.runner import Engine
from diffharness.pipeline.damaging import DamageRequest
from diffharness.pipeline.damaging import run as damage
from diffharness.pipeline.inspecting import InspectRequest, inspect
from diffharness.records.inspect import InspectRecord
from diffharness.settings import load_engine, load_tolerances
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import write_gguf

pytestmark = [pytest.mark.real, pytest.mark.slow]

ENGINE = load_engine("native")
MODELS: dict[str, Callable[[], Path]] = {"smollm2": smollm2, "gemma3": gemma3_270m}
CLEAN = ("Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K")


@dataclass(frozen=True)
class Case:
    """One fault, the tensors that it touches, and the words that a pattern of it has."""

    how: str
    tensors: str
    pattern: str | None = None
    layers: frozenset[int] | None = None
    strength: float | None = None
    verdict: str = "artifact.weights"


DAMAGED = [
    Case("noise", "blk.[58].ffn_*", "noise", frozenset({5, 8}), 8.0),
    Case("scale", "blk.7.attn_output.weight", "scale", frozenset({7}), 1.1),
    Case("offset", "blk.*.attn_norm.weight", "offset", None, -1.0),
    Case("permuted-rows", "blk.3.ffn_up.weight", "rows", frozenset({3})),
    Case("permuted-layers", "blk.[456].*", "layer", frozenset({4, 5, 6})),
    Case("rope-half-split", "blk.*.attn_[qk].weight", "rotary"),
    Case("swapped-gate-up", "blk.9.ffn_*.weight", "gate", frozenset({9})),
    Case("duplicated", "blk.6.ffn_down.weight", "blk.", frozenset({6})),
    Case("zero-blocks", "blk.2.ffn_down.weight", "zero", frozenset({2})),
    Case("rope-base-scaled", "", None, None, 2.0, "artifact.metadata"),
]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A model's checkpoint and its weights as an F32 GGUF, made once."""
    folder, done = tmp_path_factory.mktemp("real"), set[str]()

    def make(name: str) -> tuple[Path, Path]:
        checkpoint, plain = folder / name, folder / f"{name}.gguf"
        if name not in done:
            with open_gguf(MODELS[name]()) as source:
                write_checkpoint(checkpoint, source, dtype="F32")
                write_gguf(plain, source, type_of=lambda info: "F32", kv_from=source)
            done.add(name)
        return checkpoint, plain

    return make


def inspected(model: Path, checkpoint: Path) -> InspectRecord:
    return inspect(InspectRequest(model=model, checkpoint=checkpoint, engine=ENGINE, tolerances=load_tolerances()))


@pytest.mark.parametrize("mixture", CLEAN)
@pytest.mark.parametrize("name", MODELS)
def test_clean(made: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str, mixture: str) -> None:
    checkpoint, plain = made(name)
    record = inspected(Engine(ENGINE).quantize(plain, tmp_path / f"{mixture}.gguf", mixture), checkpoint)
    assert record.verdict.all == ["agree"], record.verdict
    assert record.totals.compared == record.totals.tensors > 200 and record.totals.drifted == 0
    assert record.patterns == []


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.how)
@pytest.mark.parametrize("name", MODELS)
def test_damaged(made: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str, case: Case) -> None:
    checkpoint, plain = made(name)
    if name == "gemma3" and case.how == "rope-half-split":
        case = Case("rope-interleaved", case.tensors, case.pattern)  # its rows are half-split as they stand
    clean, out = Engine(ENGINE).quantize(plain, tmp_path / "clean.gguf", "Q4_K_M"), tmp_path / "damaged.gguf"
    options = Options(tensors=case.tensors or None, layers=case.layers, strength=case.strength)
    damage(DamageRequest(clean, out, [case.how], ENGINE, options=options, checkpoint=checkpoint))
    record = inspected(out, checkpoint)
    assert record.verdict.all == [case.verdict], record.verdict
    drifted = [row.name for row in record.tensors if row.drifted]
    with open_gguf(clean) as a, open_gguf(out) as b:
        touched = [n for n in a.tensors if a.raw(n).tobytes() != b.raw(n).tobytes()]
    assert sorted(drifted) == sorted(touched), case
    assert all(fnmatchcase(n, case.tensors) for n in drifted)
    if case.pattern is not None:
        assert any(case.pattern in f"{row.kind} {row.message}".lower() for row in record.patterns), record.patterns
