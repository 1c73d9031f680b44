"""One judge for all cases, with its files in a folder of the test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.confusion.files import Files
from bench.confusion.judging import Judge
from diffharness.engine.quantizer import Quantizer
from diffharness.settings import load_engine, load_tolerances


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    settings = load_engine("native").changed(threads=1)
    with Quantizer(settings) as quantizer:
        yield Judge(Files(tmp_path_factory.mktemp("cases"), quantizer, settings), settings, load_tolerances())
