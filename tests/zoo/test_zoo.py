"""Every model that llama.cpp's own generator writes, one of each architecture: all of their nodes are replayed.

The models are random and tiny, so that what an op computes here is seldom what a real model would; but each op that an
architecture's graph holds is there, with the shapes, strides and parameters that the graph gives it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffharness.pipeline.replaying import Recording, replay_leg
from diffharness.records import KernelLeg
from diffharness.settings import EngineSettings, load_engine, load_tolerances
from diffharness.weights.gguf_file import open_gguf
from tests.zoo.build import CACHE, zoo
from tests.zoo.table import Table

pytestmark = [pytest.mark.zoo, pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

N_MODELS = 128  # of llama-cpp-python 0.3.36
N_SINGLE = 2

# Settings and the length of the batch. The generator gives models a context of 256 and a window of 32; flash attention
# takes another kernel from 64 tokens on, and DeepSeek 4 compresses 128 tokens into one.
RUNS = [("native", 24), ("native", 136), ("strict", 40)]


@pytest.fixture(scope="session")
def models() -> list[Path]:
    return zoo()


def test_the_generator_writes_every_model(models: list[Path]) -> None:
    assert len(models) >= N_MODELS


@pytest.mark.parametrize(("engine", "n_batch"), RUNS)
def test_every_node_is_replayed_and_no_engine_accused(
    engine: str, n_batch: int, models: list[Path], tables: list[Table]
) -> None:
    table = Table(f"{engine}, {n_batch} tokens together and {N_SINGLE} alone")
    tables.append(table)
    for model in models:
        table.add(model.stem, replayed(model, load_engine(engine), n_batch))
    (CACHE / f"{engine}-{n_batch}.md").write_text("\n".join(table.lines()) + "\n")
    assert not table.troubles


def replayed(model: Path, engine: EngineSettings, n_batch: int) -> KernelLeg:
    """The kernel leg of random tokens, the same for every model of one size of vocabulary."""
    with open_gguf(model) as artifact:
        tokens = np.random.default_rng(7).integers(0, artifact.vocab_size, n_batch + N_SINGLE).tolist()
        return replay_leg(Recording(artifact, tokens, engine, n_batch, N_SINGLE), load_tolerances()).leg
