"""Another version of llama-cpp-python, where one is at hand: DIFFHARNESS_OTHER_ENGINE names it, as --engine does."""

from __future__ import annotations

import os

import pytest

from diffharness.builds import find_engine
from diffharness.engine.runner import Engine
from diffharness.pipeline.bisecting import BisectRequest, run
from diffharness.settings import load_tolerances
from tests.e2e.conftest import MakePair
from tests.e2e.conftest import make_pair as make_pair  # fixtures that this file shares
from tests.oracles.conftest import make_tiny as make_tiny

OTHER = os.environ.get("DIFFHARNESS_OTHER_ENGINE", "")

pytestmark = pytest.mark.skipif(not OTHER, reason="DIFFHARNESS_OTHER_ENGINE names no other build")


def test_it_says_what_it_is() -> None:
    here, there = (Engine(find_engine(word).changed(threads=1)).info() for word in ("native", OTHER))
    assert there["commit"] and there["library"] != here["library"]


def test_strict_runs_of_two_versions_agree(make_pair: MakePair) -> None:
    """What only a change of the graph could part: everything in F32, nothing repacked, no flash attention."""
    pair = make_pair("llama")
    request = BisectRequest(
        model=pair.gguf,
        engines=["native", OTHER],
        find=lambda word: find_engine("strict").changed(
            name=word, threads=1, python=find_engine(word).python, lib_dir=find_engine(word).lib_dir
        ),
        tolerances=load_tolerances(),
        on="numbers",
        fixture=str(pair.fixture),
        n_tokens=64,
    )
    record = run(request)
    assert record.outcome == "unchanged", record.summary


def test_both_versions_agree_with_the_reference(make_pair: MakePair) -> None:
    pair = make_pair("llama", "Q8_0")
    record = run(
        BisectRequest(
            model=pair.gguf,
            engines=["native", OTHER],
            find=lambda word: find_engine(word).changed(threads=1),
            tolerances=load_tolerances(),
            on="verdict",
            fixture=str(pair.fixture),
            n_tokens=64,
        )
    )
    assert [step.verdicts for step in record.steps] == [["agree"], ["agree"]], record.summary
