"""A tiny model of every architecture that the reference knows, in eight types, and real models: all nodes replayed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.model import gemma3_270m, smollm2
from diffharness.settings import data_dir, load_engine
from tests.e2e.conftest import MakePair
from tests.e2e.conftest import make_pair as make_pair
from tests.e2e.conftest import make_tiny as make_tiny
from tests.zoo.table import Table
from tests.zoo.test_zoo import N_SINGLE, replayed

pytestmark = [pytest.mark.zoo, pytest.mark.slow, pytest.mark.timeout(3600)]

CASES = ("llama", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "gemma4", "gemma4-experts", "gemma4-e")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS")
N_BATCH = 72  # flash attention takes another kernel from 64 tokens on

F32_FLOOR, FLOOR = 1e-10, 1e-6


def test_every_architecture_in_every_type(make_pair: MakePair, tables: list[Table]) -> None:
    table = Table(f"{len(CASES)} tiny models in {len(TYPES)} types, {N_BATCH} tokens together and {N_SINGLE} alone")
    tables.append(table)
    for case in CASES:
        for type_name in TYPES:
            pair = make_pair(case, type_name)
            table.add(f"{case}-{type_name}", replayed(pair.gguf, load_engine("native"), N_BATCH))
    check(table)


def test_real_models(tables: list[Table]) -> None:
    embedded = data_dir("fixtures") / "tiny-gemma4" / "tiny-gemma4-Q4_K_M.gguf"
    table = Table(f"SmolLM2, Gemma 3 270M and the embedded model, 128 tokens together and {N_SINGLE} alone")
    tables.append(table)
    for model in (Path(smollm2()), Path(gemma3_270m()), embedded):
        table.add(model.stem, replayed(model, load_engine("native"), 128))
    check(table)


def check(table: Table) -> None:
    assert table.rows and not table.troubles
    for (op, type_name, path), row in table.rows.items():
        assert row.nmse <= (F32_FLOOR if type_name == "F32" else FLOOR), (op, type_name, path, row)
