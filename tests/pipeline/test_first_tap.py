"""Where a cell first differs: rounding is passed over, faults are placed, near ties of experts are told apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffharness.captures import Capture, CaptureWriter
from diffharness.engine.feeding import Feed
from diffharness.legs.compare import highest
from diffharness.legs.settings import Bound
from diffharness.pipeline.cell_judge import Judged
from diffharness.pipeline.first_tap import Locator, Place, locate
from diffharness.pipeline.grids import Cell
from diffharness.records import SettingsPair
from diffharness.records.matrix import CellRow

N, WIDTH, EXPERTS = 40, 24, 6
FLOORS = {
    "settings.same": 1e-10, "settings.same_token": 1e-10, "settings.rounding": 1e-6, "settings.rounding_token": 1e-5,
    "settings.factor": 6.0, "settings.token_factor": 20.0,
}  # fmt: skip
RANDOM = np.random.default_rng(0)
TRUE = {
    "token_embd": RANDOM.standard_normal((N, WIDTH)),
    "blk.0.moe_logits": RANDOM.standard_normal((N, EXPERTS)),
    "blk.0.layer_out": RANDOM.standard_normal((N, WIDTH)),
    "blk.1.layer_out": RANDOM.standard_normal((N, WIDTH)),
    "logits": RANDOM.standard_normal((N, 50)),
}
LOGITS = Bound(1e-2, np.full(N, 1e-2))
TRUE["blk.0.moe_logits"][:, :3] += 8  # three experts are chosen, and by far


def capture(path: Path, noise: float, changes: dict[str, np.ndarray] | None = None) -> Capture:
    seed = np.random.default_rng(len(path.name))
    with CaptureWriter(path, N) as writer:
        for tap, values in TRUE.items():
            found = values + noise * seed.standard_normal(values.shape)
            writer.write(tap, 0, (found + (changes or {}).get(tap, 0.0)).astype(np.float32))
    return Capture(path)


def place(tmp_path: Path, changes: dict[str, np.ndarray], *, rounded: bool = False, top_k: int | None = None) -> Place:
    base, cell = capture(tmp_path / "base", 1e-3), capture(tmp_path / "cell", 1e-3, changes)
    strict = capture(tmp_path / "strict", 0.0)
    controls = [capture(tmp_path / "rounded", 1e-3)] if rounded else []
    choice = None if top_k is None else highest(top_k)
    return locate(base, cell, strict, controls, LOGITS, np.arange(N), "rounding", FLOORS, choice=choice)


def at(tap: str, token: int, size: float) -> dict[str, np.ndarray]:
    change = np.zeros_like(TRUE[tap])
    change[token:] = size
    return {tap: change}


@pytest.mark.parametrize("rounded", [False, True])
def test_the_first_tap_and_token(tmp_path: Path, rounded: bool) -> None:
    found = place(tmp_path, at("blk.0.layer_out", 17, 0.1) | at("blk.1.layer_out", 5, 0.3), rounded=rounded)
    assert (found.tap, found.token) == ("blk.0.layer_out", 17)


def test_rounding_is_not_placed(tmp_path: Path) -> None:
    assert place(tmp_path, {}).tap is None


def test_without_controls_the_bound_of_the_logits_binds(tmp_path: Path) -> None:
    base, cell = capture(tmp_path / "base", 1e-3), capture(tmp_path / "cell", 3e-2, at("blk.0.layer_out", 11, 0.5))
    found = locate(base, cell, None, [], LOGITS, np.arange(N), "rounding", FLOORS)
    assert (found.tap, found.token) == ("blk.0.layer_out", 11)


def test_a_near_tie_explains_what_follows_at_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRUE, "blk.0.moe_logits", TRUE["blk.0.moe_logits"].copy())
    TRUE["blk.0.moe_logits"][9] = 10, 9, 8, 7.99, 0, 0  # the third and the fourth expert nearly tie
    swap = np.zeros_like(TRUE["blk.0.moe_logits"])
    swap[9, 2:4] = -0.02, 0.02
    other = np.zeros_like(TRUE["blk.0.layer_out"])
    other[9] = 1.0
    changes = {"blk.0.moe_logits": swap, "blk.0.layer_out": other}
    found = place(tmp_path, changes, top_k=3)
    assert found.tap is None and np.flatnonzero(found.flipped).tolist() == [9]
    assert place(tmp_path, changes).tap == "blk.0.layer_out"  # nobody said that it routes
    found = place(tmp_path, changes | at("blk.1.layer_out", 30, 1.0), top_k=3)
    assert (found.tap, found.token) == ("blk.1.layer_out", 30)


@pytest.mark.parametrize(
    ("far_off", "tap"),
    [({20: 0.4}, None), ({20: 0.4, 21: 0.4}, "blk.0.moe_logits"), ({20: 4.0}, "blk.0.moe_logits")],
)
def test_an_isolated_outlier_hides_no_near_tie(
    far_off: dict[int, float], tap: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token may be as far off as rounding moves the control's worst; two, or one further off, are a fault."""
    monkeypatch.setitem(TRUE, "blk.0.moe_logits", TRUE["blk.0.moe_logits"].copy())
    TRUE["blk.0.moe_logits"][9] = 10, 9, 8, 7.99, 0, 0
    change, worst = np.zeros_like(TRUE["blk.0.moe_logits"]), np.zeros_like(TRUE["blk.0.moe_logits"])
    change[9, 2:4] = -0.01, 0.01
    for token, size in far_off.items():
        change[token, 3:] = size
    worst[30, 3:] = 0.3
    base, cell = capture(tmp_path / "base", 1e-3), capture(tmp_path / "cell", 1e-3, {"blk.0.moe_logits": change})
    control = capture(tmp_path / "rounded", 1e-3, {"blk.0.moe_logits": worst})
    floors = FLOORS | {"settings.isolated_share": 0.01}
    found = locate(base, cell, None, [control], LOGITS, np.arange(N), "rounding", floors, choice=highest(3))
    assert (found.tap, bool(found.flipped[9])) == (tap, tap is None)
    assert (
        locate(base, cell, None, [control], LOGITS, np.arange(N), "rounding", FLOORS, choice=highest(3)).tap
        == "blk.0.moe_logits"
    )


def test_routers_that_are_far_off_are_no_near_ties(tmp_path: Path) -> None:
    wrong = np.zeros_like(TRUE["blk.0.moe_logits"])
    wrong[12, 3] = 30.0
    found = place(tmp_path, {"blk.0.moe_logits": wrong}, top_k=3)
    assert (found.tap, found.token) == ("blk.0.moe_logits", 12)


@pytest.mark.parametrize(("size", "token"), [(0.5, None), (3.0, 25)])
def test_what_attends_to_a_near_tie_may_be_as_far_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float, token: int | None
) -> None:
    monkeypatch.setitem(TRUE, "blk.0.moe_logits", TRUE["blk.0.moe_logits"].copy())
    TRUE["blk.0.moe_logits"][9] = 10, 9, 8, 7.99, 0, 0
    swap = np.zeros_like(TRUE["blk.0.moe_logits"])
    swap[9, 2:4] = -0.02, 0.02
    other = np.zeros_like(TRUE["blk.1.layer_out"])
    other[9], other[25] = 1.0, size
    found = place(tmp_path, {"blk.0.moe_logits": swap, "blk.1.layer_out": other}, top_k=3)
    assert found.token == token
    before = np.zeros_like(other)
    before[9], before[4] = 1.0, 0.5  # nothing attends to what comes later
    assert place(tmp_path, {"blk.0.moe_logits": swap, "blk.1.layer_out": before}, top_k=3).token == 4


@pytest.mark.parametrize(("top_k", "status"), [(None, "fail"), (2, "not judged")])
def test_what_cannot_be_placed_is_not_judged_where_experts_may_nearly_tie(top_k: int | None, status: str) -> None:
    cell = Cell(label="several", dimension="feeding", floor="rounding", feed=Feed(way="sequences"))
    row = CellRow(
        label=cell.label, dimension="feeding", feed="sequences", against="base", floor="rounding", lossy=False,
        status="fail",
    )  # fmt: skip
    pair = SettingsPair(a="base", b="several", ok=False, nmse=1.0, floor=0.1)
    judged = Judged(row, pair, compared=SimpleNamespace())  # type: ignore[arg-type]
    Locator(SimpleNamespace(runs=None), None if top_k is None else highest(top_k)).place(cell, judged)  # type: ignore[arg-type]
    assert row.status == status and (judged.pair is None) == (top_k is not None)
