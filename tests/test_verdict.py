from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffharness.records import Finding, GraphLeg, KernelLeg, Legs, SettingsLeg, VerdictKind, WithoutReplay
from diffharness.verdict import PRIORITY, decide, exit_code

GUILTY = [kind for kind in PRIORITY if kind not in ("agree", "inconclusive")]


def legs(**status: str) -> Legs:
    result = Legs()
    for name, value in status.items():
        leg = getattr(result, name)
        leg.status = value
        leg.reason = f"because of {name}" if value == "not_run" else None
    return result


def finding(kind: VerdictKind | None, **evidence: object) -> Finding:
    return Finding(kind=kind, leg=None, message=f"{kind} it is", evidence=evidence)


def judge(on: Legs, findings: list[Finding], **options):
    return decide(findings, on, **options)


ALL_PASS = {"graph": "pass", "artifact": "pass", "tokens": "pass", "settings": "pass"}


@pytest.mark.parametrize(
    ("status", "kinds", "primary", "everything", "code"),
    [
        (ALL_PASS, [], "agree", ["agree"], 0),
        (ALL_PASS, [None, None], "agree", ["agree"], 0),
        ({"graph": "pass"}, [], "agree", ["agree"], 0),
        ({"artifact": "pass"}, [], "agree", ["agree"], 0),
        ({}, [], "inconclusive", ["inconclusive"], 125),
        ({"tokens": "pass", "settings": "pass"}, [], "inconclusive", ["inconclusive"], 125),
        (ALL_PASS, ["inconclusive"], "inconclusive", ["inconclusive"], 125),
        (ALL_PASS, ["inconclusive", "tokens"], "tokens", ["tokens"], 1),
        (ALL_PASS, ["tokens", "engine.graph"], "engine.graph", ["engine.graph", "tokens"], 1),
        (ALL_PASS, ["artifact.weights", "engine.graph"], "engine.graph", ["engine.graph", "artifact.weights"], 1),
        (ALL_PASS, ["artifact.weights", "artifact.metadata"], "artifact.metadata",
         ["artifact.metadata", "artifact.weights"], 1),
        (ALL_PASS, ["tokens", "artifact.lineage"], "artifact.lineage", ["artifact.lineage", "tokens"], 1),
        (ALL_PASS, ["engine.graph", "artifact.file"], "artifact.file", ["artifact.file"], 1),
        (ALL_PASS, ["engine.settings", "artifact.file", "artifact.weights"], "artifact.file",
         ["artifact.file", "artifact.weights"], 1),
        (ALL_PASS, ["engine.settings", "engine.kernel"], "engine.kernel", ["engine.kernel", "engine.settings"], 1),
    ],
)  # fmt: skip
def test_table(status, kinds, primary, everything, code) -> None:
    verdict = judge(legs(**status), [finding(kind) for kind in kinds])
    assert (verdict.primary, verdict.all, exit_code(verdict)) == (primary, everything, code)


def test_a_crash_that_some_settings_survive_stands_before_the_artifact() -> None:
    crash = finding("engine.crash", survives={"extra_bufts": False})
    verdict = judge(legs(**ALL_PASS), [finding("artifact.metadata"), crash, finding("engine.settings")])
    assert verdict.all == ["engine.crash", "engine.settings", "artifact.metadata"]
    assert judge(legs(**ALL_PASS), [crash, finding("engine.graph")]).primary == "engine.graph"


def test_a_crash_that_nothing_survives_is_put_down_to_wrong_metadata_first() -> None:
    verdict = judge(legs(artifact="fail"), [finding("engine.crash", survives=None), finding("artifact.metadata")])
    assert verdict.all == ["artifact.metadata", "engine.crash"]
    weights = judge(legs(artifact="fail"), [finding("engine.crash", survives=None), finding("artifact.weights")])
    assert weights.all == ["engine.crash", "artifact.weights"]


def test_agreement_names_what_was_not_compared() -> None:
    verdict = judge(legs(graph="pass", tokens="pass"), [], model="a b.gguf")
    assert "(tokens, graph)" in verdict.summary
    assert (
        "not compared: the engine's kernels, the engine's settings, the artifact against a checkpoint"
        in verdict.summary
    )
    assert verdict.next_step == "diffharness run 'a b.gguf' --checkpoint DIR"


def test_agreement_names_nodes_and_settings_that_were_not_compared() -> None:
    kernel = KernelLeg(status="pass", nodes_total=90, without=[WithoutReplay(op="FOO", count=3, reason=None)])
    settings = SettingsLeg(status="pass", reason="n_ubatch 7: the engine refused")
    summary = judge(Legs(graph=GraphLeg(status="pass"), kernel=kernel, settings=settings), []).summary
    assert "nodes without a replay (3 FOO of 90)" in summary
    assert "some settings (n_ubatch 7: the engine refused)" in summary


def test_agreement_names_the_conventions() -> None:
    with_conventions = Legs(graph=GraphLeg(status="pass", conventions=["gelu_f16_table"]))
    assert "gelu_f16_table" in judge(with_conventions, []).summary


def test_inconclusive_says_why_and_what_to_do() -> None:
    verdict = judge(legs(graph="not_run", artifact="not_run"), [])
    assert "because of graph" in verdict.summary and "because of artifact" in verdict.summary
    assert verdict.next_step
    lead = Finding(kind="inconclusive", leg="graph", message="no tap matches", next_step="diffharness archs")
    assert judge(legs(**ALL_PASS), [lead]).next_step == "diffharness archs"


def test_a_command_of_one_leg_rests_on_that_leg() -> None:
    assert judge(legs(settings="pass"), [], needs=["settings"]).primary == "agree"
    assert judge(legs(graph="pass"), [], needs=["settings"]).primary == "inconclusive"


def test_the_summary_leads_with_the_primary_and_names_the_rest() -> None:
    verdict = judge(legs(**ALL_PASS), [finding("tokens"), finding("engine.graph")])
    assert verdict.summary == "engine.graph it is. Also: tokens."


def test_a_file_that_cannot_be_read_ends_with_2_and_nan_in_it_with_1() -> None:
    unreadable = finding("artifact.file")
    assert exit_code(judge(Legs(), [unreadable]), [unreadable]) == 2
    nan = Finding(kind="artifact.file", leg="artifact", message="the file holds NaN")
    assert exit_code(judge(Legs(), [nan]), [nan]) == 1


def test_a_leg_that_fails_without_a_finding_is_not_agreed_away() -> None:
    assert judge(legs(graph="fail", artifact="pass"), []).primary == "inconclusive"


@given(st.lists(st.sampled_from([*GUILTY, "inconclusive", None])), st.sampled_from(["pass", "fail", "not_run"]))
def test_whatever_is_found_a_guilty_one_is_never_agreed_away(kinds: list[VerdictKind | None], status: str) -> None:
    verdict = judge(legs(graph=status), [finding(kind) for kind in kinds])
    assert verdict.primary == verdict.all[0]
    if any(kind in GUILTY for kind in kinds):
        assert exit_code(verdict) == 1 and verdict.primary in kinds
    elif "inconclusive" in kinds or status != "pass":
        assert exit_code(verdict) == 125 and verdict.next_step
    else:
        assert exit_code(verdict) == 0
