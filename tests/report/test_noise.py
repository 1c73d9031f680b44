from __future__ import annotations

import math

import pytest

from diffharness.records import RunRecord
from diffharness.records.noise import (
    Drift,
    DriftStats,
    LargeTap,
    NativeLayer,
    NoiseReport,
    NonFiniteTap,
    RouterFlip,
    RouterFlips,
)
from diffharness.report import html, markdown, noise, terminal
from tests.report.conftest import EVIL


def stats(kl: float, flips: int) -> DriftStats:
    return DriftStats(
        kl_mean=kl, kl_error=kl / 20, kl_median=kl / 2, kl_p99=kl * 4, top1=0.96, flips=flips, flips_weight=0.1,
        worst_flip=0.016,
    )  # fmt: skip


def layer(il: int | None, ok: bool = True, kind: str = "global") -> NativeLayer:
    tap = "logits" if il is None else f"blk.{il}.ffn_out"
    return NativeLayer(
        layer=il, kind=kind, nmse_local=2e-13 if ok else 0.02, tap=tap, nmse_unsimulated=5e-4, nmse_inherited=7e-4,
        nmse_expected=6e-4, floor=1e-6, ok=ok,
    )  # fmt: skip


@pytest.fixture
def noisy(plain: RunRecord) -> RunRecord:
    drift = Drift(
        n=255, measured=stats(2.45e-3, 8), expected=stats(2.31e-3, 9), flips_expected=8.1, ratio=1.06, low=0.9,
        high=1.24, limit=4.0, ok=True,
    )  # fmt: skip
    rows = [layer(il, ok=il != 17) for il in range(30)]
    plain.legs.kernel.noise = NoiseReport(drift=drift, tokens=64, layers=[*rows, layer(None, kind="head")])
    return plain


def test_local_and_inherited_errors_stand_side_by_side(noisy: RunRecord) -> None:
    text = terminal.to_text(noisy)
    assert "Noise of the native run" in text
    assert "mean KL 2.4e-03 ± 1e-04, 2.3e-03 ± 1e-04 expected of honest kernels: 1.06 times" in text.replace(
        "\n  ", " "
    )
    assert "8 of 255, 8.1 expected by the margins, 9 in the simulation" in " ".join(text.split())
    assert "Native run, 64 tokens, 14 of 31 rows" in text
    [line] = [line for line in text.splitlines() if "fails" in line]
    assert line.split() == ["17", "global", "2.0e-02", "ffn_out", "1.0e-06", "5.0e-04", "7.0e-04", "6.0e-04", "fails"]
    assert all(len(line) <= 100 for line in text.split("Noise of the native run")[1].split("Findings")[0].splitlines())


def test_few_layers_are_all_shown_in_order(noisy: RunRecord) -> None:
    assert noisy.legs.kernel.noise is not None
    noisy.legs.kernel.noise.layers = noisy.legs.kernel.noise.layers[:9]
    table = noise.layers(noisy)
    assert table is not None and [row[0] for row in table.rows] == [f"{il} global" for il in range(9)]
    assert "rows" not in table.title


def test_of_many_layers_the_failing_and_both_ends_are_shown(noisy: RunRecord) -> None:
    table = noise.layers(noisy, 6)
    assert table is not None
    shown = [row[0] for row in table.rows]
    assert len(shown) <= 6 and shown[0] == "0 global" and "17 global" in shown and shown[-1] == "head"
    whole = noise.layers(noisy, None)
    assert whole is not None and len(whole.rows) == 31


def test_what_else_is_known_has_its_line(noisy: RunRecord) -> None:
    report = noisy.legs.kernel.noise
    assert report is not None
    report.non_finite = NonFiniteTap(tap="blk.5.attn_ctx", layer=5, token=30, count=12)
    report.first_row = 256
    report.large = [LargeTap(tap="blk.5.attn_v", layer=5, token=3, largest=40000.0, share=0.61)]
    worst = RouterFlip(layer=2, token=7, dropped=1, taken=4, margin=0.004)
    report.router = RouterFlips(
        decisions=192, flipped=5, expected=4, worst=[worst], tokens=5, kl_flipped=0.02, kl_others=1e-4
    )
    told = dict(noise.pairs(noisy))
    assert told["Not finite"] == "first blk.5.attn_ctx, token 286, 12 values in the tap"
    assert told["Near float16's end"] == "blk.5.attn_v 40000"
    assert told["Router flips"].startswith("5 of 192 choices, 4 in the simulation; over the largest margin (0.40%)")
    assert (
        "layer 2, token 7: expert 4 for 1; mean KL of those tokens 2.0e-02, of others 1.0e-04" in told["Router flips"]
    )


def test_without_a_simulation_the_reason_is_told(plain: RunRecord) -> None:
    assert noise.pairs(plain) == [] and noise.layers(plain) is None
    plain.legs.kernel.noise = NoiseReport(reason="rounding is simulated for ggml's CPU backend, not for CUDA0")
    assert noise.pairs(plain) == [("Not simulated", "rounding is simulated for ggml's CPU backend, not for CUDA0")]


def test_too_few_positions_for_an_interval_are_said_to_be_so(noisy: RunRecord) -> None:
    drift = noisy.legs.kernel.noise.drift  # type: ignore[union-attr]
    assert drift is not None
    drift.low, drift.high = 0.0, math.inf
    assert "too few positions for an interval" in dict(noise.pairs(noisy))["Drift"]


def test_the_worst_case_still_fits_an_issue_and_no_string_becomes_markup(hostile: RunRecord, noisy: RunRecord) -> None:
    report = noisy.legs.kernel.noise
    assert report is not None
    report.reason = EVIL * 20
    report.layers = [layer(il, ok=False, kind=EVIL) for il in range(200)]
    hostile.legs.kernel.noise = report
    lines = markdown.to_markdown(hostile).splitlines()
    assert len(lines) <= markdown.MAX_LINES and any(line.startswith("Reproduce: ") for line in lines)
    assert "\x1b" not in terminal.to_text(hostile) and "<script>" not in html.to_html(hostile)


def test_the_page_has_every_layer(noisy: RunRecord) -> None:
    page = html.to_html(noisy)
    assert "Noise of the native run" in page and all(f">{il} global<" in page for il in range(30))


def test_at_80_columns_no_word_of_the_table_is_cut(noisy: RunRecord) -> None:
    text = terminal.to_text(noisy, width=80).split("Native run")[1]
    assert all(len(line) <= 80 for line in text.splitlines())
    for word in ("layer", "rounded", "inherited", "expect", "17 global", "ffn_out", "head"):
        assert word in text, word
