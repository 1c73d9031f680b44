"""Every architecture by three witnesses: transformers where it has the model, the reference, and the strict engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from diffharness.fixture import from_ids, save_fixture
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.names import MAPS
from diffharness.weights.synth import SynthSource
from tests.e2e.conftest import Pair
from tests.e2e.runs import graph_only
from tests.oracles import agree
from tests.oracles.cases import CASES, Case

N_TOKENS = 80  # longer than every window and original context of the examples

OF_TRANSFORMERS = [name for name, case in CASES.items() if MAPS[case.arch].transformers]


@dataclass(frozen=True)
class Made:
    case: Case
    source: SynthSource
    folder: Path  # the checkpoint
    ids: torch.Tensor


MakeCase = Callable[[str], Made]


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> MakeCase:
    """`make_case(name)`: the case's checkpoint, made once; do not change what it returns."""
    made: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in made:
            case = CASES[name]
            source = SynthSource(case.arch, case.sizes, seed=case.seed, changes=case.changes)
            folder = tmp_path_factory.mktemp("synth") / name
            write_checkpoint(folder, source, config=source.config)
            generator = torch.Generator().manual_seed(1)
            ids = torch.randint(0, case.sizes.n_vocab, (N_TOKENS,), generator=generator)
            made[name] = Made(case, source, folder, ids)
        return made[name]

    return make


def loaded(folder: Path) -> torch.nn.Module:
    """transformers' model of a checkpoint, all of whose tensors it must find and use."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the definition, not a kernel
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **eager)
    assert not {kind: names for kind, names in info.items() if names}
    return model.eval()


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_transformers_computes_the_same_of_the_checkpoint(make_case: MakeCase, name: str, tmp_path: Path) -> None:
    made = make_case(name)
    model, checkpoint = loaded(made.folder), Checkpoint(made.folder)
    assert checkpoint.extra == []
    ours = agree.reference_logits(checkpoint, made.ids)
    assert agree.nmse(ours, agree.oracle_logits(model, made.ids)) <= made.case.transformers

    model.save_pretrained(tmp_path / "again")  # as transformers itself spells its tensors and its config
    again = Checkpoint(tmp_path / "again")
    assert again.extra == [] and again.tensors.keys() == checkpoint.tensors.keys()
    was, now = checkpoint.metadata, again.metadata
    assert not {key for key in {*was, *now} if not _same(was.get(key), now.get(key))}
    for tensor in checkpoint.tensors:
        assert np.array_equal(again.read(tensor), checkpoint.read(tensor)), tensor


def _same(a: object, b: object) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-6 * abs(b))


@pytest.mark.parametrize("name", CASES)
def test_the_checkpoint_is_the_synthetic_model(make_case: MakeCase, name: str) -> None:
    made = make_case(name)
    checkpoint = Checkpoint(made.folder)
    assert checkpoint.extra == []
    for tensor, rule in made.source.rules.items():
        if rule.hf:
            assert np.array_equal(checkpoint.read(tensor), made.source.read(tensor)), tensor


@pytest.mark.parametrize("name", CASES)
def test_strict_engine_agrees(make_case: MakeCase, name: str, tmp_path: Path) -> None:
    made = make_case(name)
    gguf, ids = tmp_path / "model.gguf", tmp_path / "ids.json"
    checkpoint_to_gguf(Checkpoint(made.folder), gguf)
    save_fixture(from_ids(made.ids.tolist(), name="random", chunk=128), ids)
    runs = graph_only(Pair(gguf, made.folder, ids), tmp_path)
    final = runs.conventions or runs.definition
    if made.case.engine_differs:
        assert not final.ok
        return
    assert final.ok, [(row.tap, row.nmse_local, row.worst_token_nmse) for row in final.failing]
    assert final.complete, final
    worst = max((row.nmse_local, row.tap) for row in final.judged if row.nmse_local is not None)
    assert worst[0] <= made.case.local and (made.case.local <= 1e-8 or made.case.why), worst
    with open_gguf(gguf) as artifact:
        from_file = agree.reference_logits(artifact, made.ids)
    assert torch.equal(from_file, agree.reference_logits(Checkpoint(made.folder), made.ids))
    shutil.rmtree(tmp_path)
