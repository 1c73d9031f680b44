"""What all tests share: one thread per test process, and the options that let slow suites run."""

from __future__ import annotations

import os

# Before torch is imported: pytest-xdist runs one process per core, each with a thread of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COLUMNS"] = "100"  # pytest-xdist sets another width, and tables fold by it

import pytest
from hypothesis import settings

# Speed is measured in bench/; a busy machine fails no test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-real", action="store_true", help="also run real models (downloads 350 MB)")
    parser.addoption("--run-confusion", action="store_true", help="also judge every case of the confusion matrix")
    parser.addoption("--run-faults", action="store_true", help="also run engines with planted faults (builds them)")
    parser.addoption("--run-zoo", action="store_true", help="also replay llama.cpp's own zoo of models (builds it)")
    parser.addoption("--run-converter", action="store_true", help="also run llama.cpp's own converter (downloads it)")


_ON_REQUEST = {
    "faults": "builds llama.cpp with planted faults: run by `make test-faults`",
    "confusion": "takes a quarter of an hour: --run-confusion, or `make confusion`",
    "zoo": "builds llama.cpp's generator of models: run by `make test-zoo`",
    "converter": "downloads llama.cpp's converter: run by `make test-converter`",
    "real": "downloads real models: run by `make test-real`",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, reason in _ON_REQUEST.items():
        if config.getoption(f"--run-{marker}"):
            continue
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
