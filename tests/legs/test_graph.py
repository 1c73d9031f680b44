from __future__ import annotations

import numpy as np
import pytest

from diffharness import metrics
from diffharness.errors import InconclusiveError
from diffharness.legs import graph
from diffharness.legs.compare import TapComparison, highest
from diffharness.taps import layer_tap

FLOORS = {"graph.local": 1e-8, "graph.local_token": 1e-7, "graph.logits": 1e-4}
N, WIDTH, CHUNK = 192, 24, 96
KINDS = ["sliding", "sliding", "global"] * 2
SHAPE = graph.GraphShape(kinds=KINDS, positions=np.arange(N) % CHUNK, landmarks={"the window": 32, "n_ubatch": 64})
LAYER = ("attn_norm", "attn_q_rope", "attn_ctx", "ffn_in", "moe_logits", "ffn_act", "moe_experts", "layer_out")
TAPS = ["token_embd", *(layer_tap(il, t) for il in range(len(KINDS)) for t in LAYER), "output_norm", "logits"]


def value(tap: str) -> np.ndarray:
    return np.random.default_rng(abs(hash(tap)) % 2**32).standard_normal((N, WIDTH)).astype(np.float32)


def a_run(change=None, *, noise: float = 1e-6, skip=(), own_noise: float | None = None, top_k: int | None = None):
    """A comparison of every tap; `change(tap, engine)` may return the engine's value changed."""
    comparison = TapComparison(N, choice=None if top_k is None else highest(top_k))
    for tap in TAPS:
        if tap in skip:
            continue
        local = value(tap)
        wobble = np.random.default_rng(7).standard_normal(local.shape).astype(np.float32)
        engine = local * (1 + np.float32(noise) * wobble)
        changed = change(tap, engine.copy()) if change else None
        engine = engine if changed is None else changed
        own = local if own_noise is None or tap == "token_embd" else local * (1 + np.float32(own_noise) * wobble)
        has_input = tap != "token_embd"
        for start in (0, N // 2):
            rows = slice(start, start + N // 2)
            comparison.feed(tap, start, engine[rows], own[rows], local[rows] if has_input else None)
    return comparison


def judged(comparison, **options):
    return graph.judge_pass(comparison, SHAPE, FLOORS, **options)


def outcome(comparison, conventions=None):
    second = None if conventions is None else judged(conventions, arithmetic=("gelu_f16_table", "rope_f32_angles"))
    return graph.judge(judged(comparison), second, engine_taps=TAPS, reference_taps=TAPS)


def on(tap_name: str, layers=None, rows=slice(None), factor: float = 1.1):
    def change(tap, engine):
        if tap.endswith(f".{tap_name}") and (layers is None or int(tap.split(".")[1]) in layers):
            engine[rows] *= np.float32(factor)
            return engine
        return None

    return change


def test_a_clean_pair_passes() -> None:
    result = outcome(a_run())
    assert result.leg.status == "pass"
    assert (result.first_divergence, result.findings, result.leg.conventions) == (None, [], [])
    assert [row.tap for row in result.leg.taps] == TAPS
    assert all(row.ok for row in result.leg.taps)
    assert [row.kind for row in result.leg.per_layer] == KINDS


def test_the_first_divergence_is_first_in_graph_order_not_the_worst() -> None:
    def change(tap, engine):
        if tap == "blk.3.attn_q_rope":
            engine[17:] *= np.float32(1.001)
        if tap == "blk.4.attn_ctx":
            engine *= np.float32(9)
        return engine

    result = outcome(a_run(change))
    assert result.leg.status == "fail"
    first = result.first_divergence
    assert first is not None
    assert (first.tap, first.layer, first.token, first.position) == ("blk.3.attn_q_rope", 3, 17, 17)
    (finding,) = result.findings
    assert finding.kind == "engine.graph"
    assert finding.evidence["failing_taps"] == ["blk.3.attn_q_rope", "blk.4.attn_ctx"]
    assert "blk.3.attn_q_rope from token 17" in finding.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            on("attn_ctx", [0, 1, 3, 4], SHAPE.positions >= 32),
            "only sliding layers (0, 1, 3, 4), only positions >= 32 (the window)",
        ),
        (on("attn_q_rope", [2, 5]), "only global layers (2, 5), from the first position on"),
        (on("attn_norm"), "all layers, from the first position on"),
        (on("attn_ctx", None, SHAPE.positions >= 64), "all layers, only positions >= 64 (n_ubatch)"),
        (
            on("attn_ctx", [4], slice(CHUNK, N)),
            "only layer 4 (sliding), from the first position on, not in the first chunk (chunks 1 of 2)",
        ),
        (lambda tap, x: x * 2 if tap == "logits" else x, "outside of the layers: logits, from the first position on"),
    ],
)
def test_it_says_which_layers_and_positions_are_affected(change, says: str) -> None:
    result = outcome(a_run(change))
    assert result.leg.affected == says
    assert says in (result.leg.reason or "")


def test_summaries_per_layer_and_position() -> None:
    leg = outcome(a_run(on("attn_ctx", [1], SHAPE.positions >= 32))).leg
    assert [row.layer for row in leg.per_layer if not row.ok] == [1]
    assert leg.per_layer[1].tap == "blk.1.attn_ctx"
    assert [(row.start, row.stop) for row in leg.per_position] == [(0, 1), (1, 16), (16, 32), (32, 64), (64, 96)]
    assert [row.ok for row in leg.per_position] == [True, True, True, False, False]


def test_an_end_to_end_error_that_no_layer_makes_does_not_convict() -> None:
    logits = metrics.compare_logits(value("logits"), value("logits") + value("noise"))
    comparison = a_run(own_noise=0.5)
    result = graph.judge(judged(comparison, logits=logits), engine_taps=TAPS, reference_taps=TAPS)
    assert result.leg.status == "pass"
    assert [f.kind for f in result.findings] == [None]
    assert "magnifies" in result.findings[0].message


def test_with_a_hole_in_the_local_comparison_the_end_decides() -> None:
    logits = metrics.compare_logits(value("logits"), value("logits") + value("noise"))
    comparison = a_run(skip={"blk.2.layer_out"})
    result = graph.judge(judged(comparison, logits=logits), engine_taps=TAPS, reference_taps=TAPS)
    assert result.leg.status == "fail"
    assert result.findings[0].kind == "engine.graph"
    assert "end to end" in (result.leg.reason or "")
    same = metrics.compare_logits(value("logits"), value("logits"))
    assert graph.judge(judged(comparison, logits=same), engine_taps=TAPS, reference_taps=TAPS).leg.status == "pass"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (on("ffn_act", factor=1.0005), ["gelu_f16_table"]),
        (on("attn_q_rope", rows=slice(50, None), factor=1.0005), ["rope_f32_angles"]),
    ],
)
def test_what_a_convention_explains_passes_and_is_named(change, named) -> None:
    result = outcome(a_run(change), a_run())
    assert result.leg.status == "pass"
    assert result.leg.conventions == named
    assert result.leg.as_defined is not None and not result.leg.as_defined.ok
    assert result.leg.with_conventions is not None and result.leg.with_conventions.ok
    assert [f.kind for f in result.findings] == [None]
    assert named[0] in result.findings[0].message


def test_what_no_convention_explains_fails_at_the_real_first_tap() -> None:
    fault = on("attn_ctx", [4])
    both = lambda tap, x: fault(tap, x) if tap.endswith("attn_ctx") else on("ffn_act", factor=1.001)(tap, x)  # noqa: E731
    result = outcome(a_run(both), a_run(fault))
    assert result.leg.status == "fail"
    assert result.first_divergence is not None and result.first_divergence.tap == "blk.4.attn_ctx"


def router(flip_rows, gap: float, error: float):
    """Experts 3 and 4 tie for the second place but for `gap`; the engine's choice differs at `flip_rows`."""

    def logits(flipped: bool) -> np.ndarray:
        x = np.tile(np.linspace(-3, -2, WIDTH, dtype=np.float32), (N, 1))
        x[:, 0], x[:, 3], x[:, 4] = 5.0, 4.0 + gap, 4.0
        if flipped:
            x[flip_rows, 4] += gap + error
        return x

    return logits(False), logits(True)


def moe_run(gap: float, error: float, flip_rows=(10, 20), damage: bool = True):
    reference, engine = router(list(flip_rows), gap, error)
    comparison = TapComparison(N, choice=highest(2))
    for tap in TAPS:
        local = value(tap)
        other = local.copy()
        if tap == "blk.1.moe_logits":
            local, other = reference, engine
        elif tap in ("blk.1.moe_experts", "blk.1.layer_out") and damage:
            other[list(flip_rows)] *= 1.5
        comparison.feed(tap, 0, other, local, local)
    return comparison


def test_a_near_tie_of_the_router_is_no_fault() -> None:
    result = outcome(moe_run(gap=1e-6, error=1e-6))
    assert result.leg.status == "pass"
    assert result.leg.router_ties == 2
    left_out = {row.tap: row.left_out for row in result.leg.taps if row.left_out}
    assert left_out == {"blk.1.ffn_act": 2, "blk.1.moe_experts": 2, "blk.1.layer_out": 2}
    assert "near tie" in result.findings[0].message


def test_a_router_that_is_off_by_more_than_its_floor_fails() -> None:
    result = outcome(moe_run(gap=0.2, error=0.1))
    assert result.first_divergence is not None and result.first_divergence.tap == "blk.1.moe_logits"
    assert result.leg.router_ties == 0


def test_experts_that_differ_without_a_tie_fail() -> None:
    comparison = TapComparison(N, choice=highest(2))
    reference, _ = router([], 0.5, 0.0)
    for tap in TAPS:
        local = reference if tap == "blk.1.moe_logits" else value(tap)
        comparison.feed(tap, 0, local * (2 if tap == "blk.1.moe_experts" else 1), local, local)
    result = outcome(comparison)
    assert result.first_divergence is not None and result.first_divergence.tap == "blk.1.moe_experts"


def test_ties_everywhere_are_not_a_pass_of_what_was_left_out() -> None:
    comparison = moe_run(gap=1e-6, error=1e-6, flip_rows=range(N))
    result = judged(comparison)
    row = next(r for r in result.rows if r.tap == "blk.1.layer_out")
    assert row.ok is None and not result.complete


def test_nothing_shared_is_inconclusive() -> None:
    with pytest.raises(InconclusiveError, match="no tap of the engine matches"):
        graph.judge(judged(a_run()), engine_taps=["x"], reference_taps=TAPS)


def test_nothing_local_is_inconclusive() -> None:
    comparison = TapComparison(N)
    comparison.feed("logits", 0, value("logits"), value("logits"))
    with pytest.raises(InconclusiveError, match="no tap could be compared locally"):
        judged(comparison)


def test_unmatched_taps_are_information() -> None:
    result = graph.judge(judged(a_run()), engine_taps=[*TAPS, "blk.0.attn_k"], reference_taps=[*TAPS, "blk.0.attn_v"])
    assert result.leg.unmatched.engine == ["blk.0.attn_k"]
    assert [f.kind for f in result.findings] == [None, None]


UNREAD = ["blk.1.attn_k.bias"]


def test_tensors_that_the_reference_did_not_read_are_told() -> None:
    result = graph.judge(judged(a_run()), engine_taps=TAPS, reference_taps=TAPS, unread=UNREAD)
    assert result.leg.status == "pass" and result.leg.unread == UNREAD
    assert "blk.1.attn_k.bias" in result.findings[-1].message and result.findings[-1].kind is None


def test_keys_that_nobody_knows_are_told_and_change_no_status() -> None:
    keys = ["llama.attention.gizmo"]
    for change, status in ((None, "pass"), (on("attn_ctx", layers={1}), "fail")):
        result = graph.judge(
            judged(a_run(*([change] if change else []))), engine_taps=TAPS, reference_taps=TAPS, unknown_keys=keys
        )
        assert result.leg.status == status and result.leg.unknown_keys == keys
        note = result.findings[-1]
        assert note.kind is None and note.message.startswith("1 metadata key of the artifact is known neither")
        assert "llama.attention.gizmo" in note.message
    clean = graph.judge(judged(a_run()), engine_taps=TAPS, reference_taps=TAPS)
    assert clean.leg.unknown_keys == [] and clean.findings == []


@pytest.mark.parametrize(
    ("unread", "status"),
    [
        (UNREAD, "not_run"),
        (["output.bias"], "not_run"),
        (["blk.1.attn_k.input_scale"], "fail"),
        (["blk.9.attn_k.bias", "cls.output.weight", "v.patch_embd.weight"], "fail"),  # there are 6 layers
        ([], "fail"),
    ],
)
def test_nobody_is_accused_over_what_the_reference_did_not_read(unread: list[str], status: str) -> None:
    changed = judged(a_run(on("attn_ctx", layers={1})))
    result = graph.judge(changed, engine_taps=TAPS, reference_taps=TAPS, unread=unread)
    accused = any(finding.kind == "engine.graph" for finding in result.findings)
    withheld = any(finding.kind == "inconclusive" for finding in result.findings)
    assert (result.leg.status, accused, withheld) == (status, status == "fail", status == "not_run")
    assert (result.first_divergence is None) == withheld


def test_a_floor_can_be_set_for_one_tap() -> None:
    change = on("ffn_act", factor=1.001)
    loose = FLOORS | {"graph.local.ffn_act": 1e-4, "graph.local_token.ffn_act": 1e-4}
    assert not judged(a_run(change)).ok
    assert graph.judge_pass(a_run(change), SHAPE, loose).ok


def test_non_finite_values_are_part_of_the_evidence() -> None:
    def change(tap, engine):
        if tap == "blk.2.ffn_act":
            engine[5, 5] = np.inf
        return engine

    result = outcome(a_run(change))
    assert result.findings[0].evidence["non_finite"] == {"engine": 1, "reference": 0}
    assert result.first_divergence is not None and result.first_divergence.token == 5


def isolated(share: float, size: float, arithmetic=("gelu_f16_table",)):
    """`ffn_act` of layer 2 off by `size` (NMSE) at the first `share` of the tokens."""
    comparison = a_run(on("ffn_act", layers={2}, rows=slice(0, int(share * N)), factor=1 + size**0.5))
    floors = FLOORS | {"graph.isolated_share": 0.02, "graph.gelu_token.ffn_act": 1e-5}
    return graph.judge_pass(comparison, SHAPE, floors, arithmetic=arithmetic)


def test_a_step_of_the_gelu_table_at_a_token_or_two_is_no_fault() -> None:
    result = isolated(0.02, 3e-6)
    assert result.ok
    row = next(row for row in result.rows if row.tap == layer_tap(2, "ffn_act"))
    assert row.left_out == 3 and row.nmse_local is not None and row.nmse_local <= 1e-8 < row.nmse


@pytest.mark.parametrize(
    ("share", "size", "arithmetic"),
    [(0.05, 3e-6, ("gelu_f16_table",)), (0.02, 3e-5, ("gelu_f16_table",)), (0.02, 3e-6, ())],
    ids=["too many tokens", "too large", "no table"],
)
def test_more_than_a_step_of_the_table_is_a_fault(share: float, size: float, arithmetic) -> None:
    assert [row.tap for row in isolated(share, size, arithmetic).failing] == [layer_tap(2, "ffn_act")]


def test_holes_without_logits_decide_nothing() -> None:
    """Only the embedding could be compared, and no logits: that is no agreement."""
    lone = TapComparison(N)
    lone.feed("token_embd", 0, value("token_embd"), value("token_embd"))
    result = judged(lone)
    assert not result.ok and result.undecided
    with pytest.raises(InconclusiveError, match="no logits to compare"):
        graph.judge(result, engine_taps=TAPS, reference_taps=TAPS)
