"""One place at a time gives what the whole forward gives there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffharness.errors import InconclusiveError
from diffharness.reference.archs import build
from diffharness.reference.hypotheses import Place
from diffharness.reference.local import Chunk, LocalForward
from diffharness.reference.runner import Layer, Reference
from tests.reference.random_source import LLAMA, RandomSource

IDS = [np.arange(10) * 3 % 40, np.arange(7) * 5 % 40]
CHUNKS = [Chunk(IDS[0], slice(0, 10)), Chunk(IDS[1], slice(10, 17))]


def forward(source: RandomSource) -> tuple[LocalForward, dict[str, Tensor]]:
    taps: dict[str, list[Tensor]] = {}
    Reference(source).run(IDS, on_tap=lambda tap, own, _, rows: taps.setdefault(tap, []).append(own.clone()))
    whole = {tap: torch.cat(values) for tap, values in taps.items()}

    def inputs(place: Layer) -> np.ndarray | None:
        name = "blk.2.layer_out" if place == "head" else f"blk.{place - 1}.layer_out" if place else "token_embd"
        return whole[name].numpy() if place != 1 else None

    return LocalForward(source, inputs), whole


@pytest.mark.parametrize("place", ["embed", 0, 2, "head"])
def test_taps_are_those_of_the_whole_forward(place: Place) -> None:
    local, whole = forward(RandomSource(LLAMA))
    seen = []

    def on_tap(name: str, value: Tensor, rows: slice) -> None:
        full = f"blk.{place}.{name}" if isinstance(place, int) else name
        assert torch.allclose(value, whole[full][rows], atol=1e-5)
        seen.append(name)

    local.run(build(LLAMA), place, CHUNKS, on_tap)
    local.close()
    expected = {name.removeprefix(f"blk.{place}.") for name in whole if name.startswith(f"blk.{place}.")}
    assert set(seen) == (expected or ({"token_embd"} if place == "embed" else {"output_norm", "logits"}))


def test_tensors_of_a_place_are_read_once() -> None:
    source = RandomSource(LLAMA)
    local, _ = forward(source)
    source.reads.clear()
    for _ in range(3):
        local.run(build(LLAMA), 2, CHUNKS, lambda *_: None)
    assert sorted(set(source.reads)) == sorted(source.reads) and all(name.startswith("blk.2.") for name in source.reads)


def test_a_missing_input_is_said() -> None:
    local, _ = forward(RandomSource(LLAMA))
    with pytest.raises(InconclusiveError, match="input of layer 1"):
        local.run(build(LLAMA), 1, CHUNKS, lambda *_: None)
