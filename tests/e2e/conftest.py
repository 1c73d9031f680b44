"""Tiny models as GGUF files, in any type, with a fixture of ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffharness.engine.runner import Engine
from diffharness.fixture import from_ids, save_fixture
from diffharness.settings import load_engine
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from tests.oracles.conftest import Tiny
from tests.oracles.conftest import make_tiny as make_tiny  # a fixture that this folder shares


@dataclass(frozen=True)
class Pair:
    """A checkpoint, the GGUF made from it, and ids to run both on."""

    gguf: Path
    checkpoint: Path
    fixture: Path


MakePair = Callable[..., Pair]


@pytest.fixture(scope="session")
def make_pair(make_tiny: Callable[..., Tiny], tmp_path_factory: pytest.TempPathFactory) -> MakePair:
    """`make_pair(case, type_name="F32")`: a type other than F32, F16 and BF16 takes the wide variant."""
    made: dict[tuple[str, str], Pair] = {}

    def make(case: str, type_name: str = "F32") -> Pair:
        if (case, type_name) not in made:
            quantized = type_name not in ("F32", "F16", "BF16")
            tiny = make_tiny(case, wide=quantized)
            folder = tmp_path_factory.mktemp("pair")
            gguf, fixture = folder / f"{case}-{type_name}.gguf", folder / "ids.json"
            save_fixture(from_ids(tiny.ids.tolist(), name="random", chunk=128), fixture)
            checkpoint = Checkpoint(tiny.folder)
            if quantized:
                plain = folder / "plain.gguf"
                checkpoint_to_gguf(checkpoint, plain)
                types = {name: type_name for name, info in checkpoint.tensors.items() if len(info.shape) > 1}
                Engine(load_engine("native").changed(threads=1)).quantize_like(plain, gguf, types)
                plain.unlink()
            else:
                checkpoint_to_gguf(checkpoint, gguf, type_name=type_name)
            made[case, type_name] = Pair(gguf, tiny.folder, fixture)
        return made[case, type_name]

    return make
