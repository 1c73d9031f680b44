from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffharness.errors import BadInputError
from diffharness.records import (
    SCHEMA,
    ArtifactSubject,
    Finding,
    Legs,
    LogitStats,
    RunRecord,
    Score,
    Scores,
    Subject,
    TapRow,
    Verdict,
    load_record,
    parse_record,
    plain,
)
from diffharness.records.__main__ import record_of


def record(**changes: object) -> RunRecord:
    fields: dict[str, object] = {
        "verdict": Verdict(primary="agree", all=["agree"], summary="ok"),
        "subject": Subject(artifact=ArtifactSubject(path="m.gguf")),
    }
    return RunRecord.model_validate({**fields, **changes})


def test_top_level_keys_are_the_design_s() -> None:
    data = json.loads(record().to_json())
    assert list(data) == [
        "schema", "verdict", "first_divergence", "legs", "scores", "engines", "findings", "subject", "repro", "timings",
    ]  # fmt: skip
    assert data["schema"] == SCHEMA
    assert set(data["legs"]) == {"graph", "kernel", "settings", "artifact", "tokens"}
    assert set(data["verdict"]) == {"primary", "all", "summary", "next_step"}
    assert {"status", "reason", "logits", "taps"} <= set(data["legs"]["graph"])
    assert {"nodes_replayed", "nodes_total", "worst"} <= set(data["legs"]["kernel"])


def test_it_comes_back_as_it_was(tmp_path) -> None:
    before = record(
        scores=Scores(reference={"artifact": Score(ppl=4.5, nll=1.5)}),
        findings=[Finding(kind="engine.graph", leg="graph", message="m", evidence={"a": np.float32(1.5), "b": (1, 2)})],
    )
    (tmp_path / "run.json").write_text(before.to_json(), encoding="utf-8")
    assert load_record(tmp_path) == before
    assert load_record(tmp_path / "run.json").findings[0].evidence == {"a": 1.5, "b": [1, 2]}


@given(st.floats())
def test_any_float_survives_strict_json(value: float) -> None:
    legs = Legs()
    legs.graph.logits = LogitStats(nmse=value, kl_mean=0, kl_p99=0, kl_max=value, top1=1)
    legs.graph.taps = [TapRow(tap="logits", nmse=value)]
    text = record(legs=legs, findings=[Finding(kind=None, leg=None, message="", evidence={"x": value})]).to_json()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    back = parse_record(text)
    assert back.legs.graph.logits is not None
    for got in (back.legs.graph.logits.nmse, back.legs.graph.taps[0].nmse):
        assert got == value or (math.isnan(value) and got is not None and math.isnan(got))


def test_plain_unpacks_numpy_and_non_finite() -> None:
    assert plain({"a": np.array([1.0, math.inf]), 2: np.int64(3), "n": float("nan"), "p": object}) == {
        "a": [1.0, "inf"], "2": 3, "n": "nan", "p": str(object),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "expected a JSON run record"),
        ("[]", "found 'list'"),
        ('{"schema": "diffharness.run/2"}', "expected schema 'diffharness.run/1', found 'diffharness.run/2'"),
        ('{"schema": "diffharness.run/1"}', "verdict"),
    ],
)
def test_what_is_no_record_is_bad_input(text: str, says: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse_record(text)
    assert says in str(caught.value)


def test_unknown_fields_are_refused() -> None:
    data = json.loads(record().to_json()) | {"surprise": 1}
    with pytest.raises(BadInputError, match="surprise"):
        parse_record(json.dumps(data))


def test_a_missing_file_is_bad_input(tmp_path) -> None:
    with pytest.raises(BadInputError, match="cannot read"):
        load_record(tmp_path / "none.json")


def test_the_schema_can_be_exported() -> None:
    schema = RunRecord.model_json_schema(mode="serialization")
    assert schema["properties"]["schema"]["const"] == SCHEMA
    assert "TapRow" in schema["$defs"]
    assert RunRecord.model_json_schema()["properties"]["schema"]["const"] == SCHEMA


@pytest.mark.parametrize(
    "name",
    [
        "run",
        "inspect",
        "grade",
        "restore",
        "recipe",
        "gate",
        "damage",
        "replay",
        "matrix",
        "explain",
        "compare",
        "bisect",
        "synth",
    ],
)
def test_the_published_schema_is_the_one_in_force(name: str) -> None:
    """`docs/NAME.schema.json` is made from the models: `python -m diffharness.records NAME > docs/NAME.schema.json`."""
    published = Path(__file__).parents[1] / "docs" / f"{name}.schema.json"
    in_force = record_of(name).model_json_schema(mode="serialization")
    assert json.loads(published.read_text(encoding="utf-8")) == in_force
    assert in_force["properties"]["schema"]["const"] == f"diffharness.{name}/1"
