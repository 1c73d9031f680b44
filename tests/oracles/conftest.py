"""Tiny checkpoints, made once per test session and case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from diffharness.weights.checkpoint import Checkpoint
from tests.oracles import tiny, tiny_gemma

logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass(frozen=True)
class Tiny:
    """A tiny model as transformers has it, its folder, and tokens for it."""

    model: Any
    folder: Path
    ids: torch.Tensor

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """`make_tiny(case, wide=False)`: the case's model, saved; do not change what it returns."""
    made: dict[tuple[str, bool], Tiny] = {}

    def make(case: str, wide: bool = False) -> Tiny:
        if (case, wide) not in made:
            cases = tiny if case in tiny.CASES else tiny_gemma
            model = cases.build_model(case, wide=wide)
            folder = tmp_path_factory.mktemp("tiny") / case
            model.save_pretrained(folder)
            made[case, wide] = Tiny(model, folder, cases.tokens(case))
        return made[case, wide]

    return make
