from __future__ import annotations

import pytest

from diffharness.legs import tokens


def test_the_same_ids_pass() -> None:
    outcome = tokens.compare([1, 2, 3], [1, 2, 3])
    assert (outcome.leg.status, outcome.leg.compared, outcome.findings) == ("pass", 3, [])


@pytest.mark.parametrize(
    ("checkpoint", "artifact", "position", "ids"),
    [
        ([1, 2, 3], [1, 9, 3], 1, (2, 9)),
        ([1, 2, 3], [1, 2], 2, (3, None)),
        ([1], [1, 2], 1, (None, 2)),
        ([], [5], 0, (None, 5)),
    ],
)
def test_the_first_difference_is_named(checkpoint, artifact, position, ids) -> None:
    pieces = {1: "a", 2: "b", 3: "c", 5: "e", 9: "\n"}
    outcome = tokens.compare(
        checkpoint, artifact, checkpoint_piece=pieces.__getitem__, artifact_piece=pieces.__getitem__
    )
    first = outcome.leg.first_difference
    assert first is not None
    assert (first.position, (first.checkpoint_id, first.artifact_id)) == (position, ids)
    assert first.checkpoint_text == (None if ids[0] is None else pieces[ids[0]])
    assert first.artifact_text == (None if ids[1] is None else pieces[ids[1]])
    (finding,) = outcome.findings
    assert finding.kind == "tokens" and f"position {position}" in finding.message


def test_no_tokens_at_all_is_not_a_pass() -> None:
    assert tokens.compare([], []).leg.status == "not_run"
