from __future__ import annotations

import gguf
import numpy as np
import pytest

from diffharness.errors import EngineError
from diffharness.forensics import rows as rows_module
from diffharness.forensics import sample
from diffharness.forensics.control import Control
from diffharness.forensics.drift import tensor_errors
from tests.forensics.test_drift import CLEAN, FLOORS, Source, through, types


class Counting:
    """gguf-py's quantizer, which notes how many rows it was given."""

    def __init__(self) -> None:
        self.n_rows = 0

    def __call__(self, rows: np.ndarray, type_name: str, importance: np.ndarray | None = None) -> np.ndarray:
        if type_name == "Q5_1":
            raise EngineError("no Q5_1 today")
        self.n_rows += len(rows)
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[type_name])


@pytest.fixture
def quantize() -> Counting:
    return Counting()


def test_the_checkpoint_in_the_artifacts_types(quantize: Counting) -> None:
    kinds = types(CLEAN) | {"blk.0.ffn_up.weight": "Q8_0"}
    artifact = Source({name: v for name, v in CLEAN.items() if name != "blk.1.attn_q.weight"}, kinds)
    control = Control(Source(CLEAN), artifact, quantize)
    assert (control.arch, list(control.tensors)) == ("test", list(CLEAN))
    assert control.tensors["blk.0.ffn_up.weight"].type == "Q8_0"
    assert control.tensors["blk.0.ffn_up.weight"].n_bytes == 96 * 68
    for name in artifact.tensors:
        np.testing.assert_array_equal(control.read(name), artifact.read(name))
    np.testing.assert_array_equal(control.read("blk.1.attn_q.weight"), CLEAN["blk.1.attn_q.weight"])
    some = np.array([5, 2])
    for rows in (slice(3, 9), some):
        np.testing.assert_array_equal(
            control.take("blk.0.ffn_up.weight", rows), artifact.take("blk.0.ffn_up.weight", rows)
        )
    np.testing.assert_array_equal(control.take("blk.0.attn_norm.weight", some), CLEAN["blk.0.attn_norm.weight"][some])


def test_experts(quantize: Counting) -> None:
    stack = np.random.default_rng(1).standard_normal((3, 8, 64)).astype(np.float32)
    values, kinds = {"blk.0.ffn_up_exps.weight": stack}, {"blk.0.ffn_up_exps.weight": "Q4_0"}
    control = Control(Source(values), Source(values, kinds), quantize)
    np.testing.assert_array_equal(control.take("blk.0.ffn_up_exps.weight", slice(1, 2)), through(stack[1:2], "Q4_0"))


def test_what_is_not_finite_is_left_out(quantize: Counting) -> None:
    bad = CLEAN["blk.0.ffn_up.weight"].copy()
    bad[0, 0], bad[1, 1] = np.nan, np.inf
    source = Source({"blk.0.ffn_up.weight": bad})
    control = Control(source, Source(CLEAN, types(CLEAN)), quantize)
    assert np.isfinite(control.read("blk.0.ffn_up.weight")).all()


# -- of large tensors only some rows ------------------------------------------------------------------

NAME = "token_embd.weight"
BIG = np.random.default_rng(0).standard_normal((4000, 1024)).astype(np.float32)
BIG[::7] *= 30  # rows are not alike


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large in earnest would take seconds here."""
    monkeypatch.setattr(sample, "_VALUES", 1 << 16)
    monkeypatch.setattr(rows_module, "_WHOLE", 1 << 16)
    monkeypatch.setattr(rows_module, "_RUN", 1 << 18)


def judged(values: np.ndarray, quantize: Counting, kind: str = "Q4_0", **observers):
    artifact, checkpoint = Source({NAME: values}, {NAME: kind}), Source({NAME: BIG.reshape(values.shape)})
    control = Control(checkpoint, artifact, quantize)
    (found,) = tensor_errors(artifact, checkpoint, control, FLOORS, **observers).tensors
    return found


@pytest.mark.parametrize("shape", [(4000, 1024), (8, 500, 1024)])
def test_a_sample_tells_the_usual_error(quantize: Counting, shape: tuple[int, ...]) -> None:
    found = judged(BIG.reshape(shape), quantize)
    assert not found.damaged and found.exact and found.far_rows == 0
    assert quantize.n_rows == 64
    assert found.control == pytest.approx(found.error, rel=0.05)


@pytest.mark.parametrize("shape", [(4000, 1024), (8, 500, 1024)])
@pytest.mark.parametrize("fault", [np.zeros_like, lambda x: x[::-1]])
def test_a_damaged_block_is_found_wherever_it_is(quantize: Counting, shape: tuple[int, ...], fault) -> None:
    bad = BIG.copy()
    bad[3210, 256:512] = fault(bad[3210, 256:512])
    found = judged(bad.reshape(shape), quantize)
    assert (found.damaged, found.far_rows) == (True, 1)
    assert found.far is not None and np.flatnonzero(found.far).tolist() == [3210]
    assert quantize.n_rows == 64 + 1


def test_rows_that_lose_more_than_others_are_judged_by_their_own_control(quantize: Counting) -> None:
    """Spikes in a few rows, as large as their blocks' other values are lost: the checkpoint has them as well."""
    spiked = BIG.copy()
    spiked[1000:1010, ::32] = 300 * np.abs(BIG).max()
    artifact, checkpoint = Source({NAME: spiked}, {NAME: "Q4_0"}), Source({NAME: spiked})
    (found,) = tensor_errors(artifact, checkpoint, Control(checkpoint, artifact, quantize), FLOORS).tensors
    assert not found.damaged


def test_damage_everywhere(quantize: Counting) -> None:
    found = judged(np.roll(BIG, 1, axis=0), quantize)
    assert found.error > found.limit and found.damaged
    assert quantize.n_rows <= 3 * 64


def test_every_row_is_seen_once_and_in_order(quantize: Counting) -> None:
    seen: list[np.ndarray] = []
    sampled: list[tuple[np.ndarray, ...]] = []

    def on_tensor(name, info, a, b, c) -> None:
        assert (name, info.type, c) == (NAME, "Q4_0", None)
        assert a.shape == b.shape and a.size <= 1 << 18
        seen.append(b)

    judged(BIG, quantize, on_tensor=on_tensor, on_sample=lambda name, info, *rows: sampled.append(rows))
    np.testing.assert_array_equal(np.concatenate(seen), BIG)
    ((a, b, c),) = sampled
    assert b.shape == (64, 1024)
    np.testing.assert_array_equal(c, through(b, "Q4_0"))
    np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_large_tensors_of_floats_are_judged_value_by_value(quantize: Counting, kind: str) -> None:
    assert not judged(BIG, quantize, kind).damaged
    assert judged(through(BIG, "BF16"), quantize, "F32").note == "the checkpoint's values rounded to BF16"
    bad = BIG.copy()
    bad[3999, 1023] *= 1.5
    assert judged(bad, quantize, kind).far_rows == 1
    assert quantize.n_rows == 0


def test_without_a_control_of_its_type_a_tensor_is_not_judged(quantize: Counting) -> None:
    artifact, checkpoint = Source({NAME: BIG}, {NAME: "Q5_1"}), Source({NAME: BIG})
    (found,) = tensor_errors(artifact, checkpoint, Control(checkpoint, artifact, quantize), FLOORS).tensors
    assert (found.judged, found.damaged, found.no_control) == (False, False, "no Q5_1 today")
