"""Several engines in one run: which differs, where first, and which of two is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffharness.pipeline import engine_runs, reference_runs, strict_way
from diffharness.pipeline.engines_ab import ab_rows
from diffharness.pipeline.folder import run_folder
from diffharness.pipeline.inputs import open_inputs
from diffharness.pipeline.reference_runs import Precision
from diffharness.pipeline.request import RunRequest
from diffharness.pipeline.timing import Timings
from diffharness.pipeline.work import Work
from diffharness.records import EngineRow, Finding
from diffharness.settings import EngineSettings, load_tolerances
from tests.e2e.conftest import MakePair
from tests.e2e.conftest import make_pair as make_pair  # fixtures that this file shares
from tests.engine import stand_in as planted
from tests.engine.stand_in import stand_in
from tests.oracles.conftest import make_tiny as make_tiny

Compared = tuple[list[EngineRow], list[Finding]]
NATIVE = EngineSettings(threads=1, time_limit_s=120)
# Only the artifact itself, not its F32 twin: as a wrong kernel of a quantized type.
OTHER_KERNEL = f"'strict' in job['model'] or exec({planted.OTHER_NUMBERS.replace('1.01', '1.5')!r})"


@pytest.fixture
def compared(make_pair: MakePair, tmp_path: Path) -> Callable[..., Compared]:
    pair = make_pair("llama", "Q8_0")

    def engine(name: str, code: str) -> EngineSettings:
        return NATIVE.changed(name=name, python=stand_in(tmp_path / name, code))

    def compare(first: str = planted.SAME, *, settings: dict[str, object] | None = None, **others: str) -> Compared:
        request = RunRequest(
            model=pair.gguf,
            engine=engine("first", first),
            others=tuple(engine(name, code).changed(**settings or {}) for name, code in others.items()),
            tolerances=load_tolerances(),
            fixture=str(pair.fixture),
            n_tokens=48,
        )
        inputs = open_inputs(request.model, None, request.fixture, request.n_tokens, NATIVE)
        with run_folder(None) as folder:
            work = Work(request, inputs, folder, Timings())
            with strict_way.strict_model(work) as strict:
                runs = engine_runs.run_all(work, strict)
                graph = None
                if runs.strict is not None:
                    graph = reference_runs.against_engine(
                        inputs.artifact,
                        runs.strict.open(),
                        inputs.fixture,
                        work.floors,
                        precision=Precision(),
                        n_ubatch=512,
                    )
                return ab_rows(work, runs, graph, strict)

    return compare


def test_one_engine_alone_has_no_rows(compared: Callable[..., Compared]) -> None:
    assert compared() == ([], [])


def test_the_same_engine_twice(compared: Callable[..., Compared]) -> None:
    (first, other), findings = compared(other=planted.SAME)
    assert (first.name, first.status, other.name, other.status) == ("first", "first", "other", "same")
    assert other.logits is not None and other.logits.nmse == 0 and other.strict_from_first == 0
    assert other.ppl == first.ppl and first.strict == other.strict is not None and other.first_tap is None
    assert findings == []


def test_another_graph_is_convicted(compared: Callable[..., Compared]) -> None:
    (first, other), (finding,) = compared(other=planted.OTHER_ROPE)
    assert (other.status, other.first_tap) == ("differs", "blk.0.attn_q_rope") and other.first_token is not None
    assert finding.kind == "engine.graph" and "other computes something else than the model" in finding.message
    assert finding.next_step is not None and finding.next_step.endswith("--engine other")
    assert first.strict is not None and other.strict is not None and other.strict > 1e-4 > first.strict


def test_the_first_may_be_the_wrong_one(compared: Callable[..., Compared]) -> None:
    _, (finding,) = compared(planted.OTHER_ROPE, other=planted.SAME)
    assert finding.kind is None and "other is nearer to the model than first" in finding.message


def test_another_kernel_is_not_decided_here(compared: Callable[..., Compared]) -> None:
    (_, other), (finding,) = compared(other=OTHER_KERNEL)
    assert other.strict_from_first == 0 and other.status == "differs" and other.first_tap == "logits"
    assert finding.kind == "inconclusive" and "more than rounding explains" in finding.message


def test_rounding_is_information(compared: Callable[..., Compared]) -> None:
    (_, other), (finding,) = compared(other=planted.SAME, settings={"type_k": "Q8_0"})
    assert other.status == "differs" and other.settings == {"type_k": "Q8_0"}
    assert finding.kind is None and "no more than rounding explains" in finding.message


def test_engines_that_do_not_run_are_rows(compared: Callable[..., Compared]) -> None:
    refuses = "raise __import__('diffharness.errors').errors.EngineError('not today')"
    rows, findings = compared(dies=planted.DIES_RUNNING, refuses=refuses, fine=planted.SAME)
    assert [row.status for row in rows] == ["first", "not_run", "not_run", "same"]
    assert [finding.kind for finding in findings] == ["engine.crash", None]
    assert rows[1].reason is not None and "SIGSEGV" in rows[1].reason


def test_nothing_to_compare_with(compared: Callable[..., Compared]) -> None:
    rows, (finding,) = compared(planted.DIES_RUNNING, other=planted.SAME)
    assert rows == [] and "the other engines were not run" in finding.message
