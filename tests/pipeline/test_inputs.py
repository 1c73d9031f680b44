"""What a run opens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from diffharness.cli._models import embedded
from diffharness.pipeline.inputs import open_artifact, open_checkpoint
from diffharness.weights import gguf_file, safetensors_file


@pytest.mark.parametrize("threads", [1, 3])
def test_weights_are_dequantized_in_the_threads_of_the_run(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []

    def noted(dequantize: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, threads=None, **named: (seen.append(threads), dequantize(*args, **named))[1]

    for module in (gguf_file, safetensors_file):
        monkeypatch.setattr(module, "dequantize", noted(module.dequantize))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # as --threads does
    try:
        with open_artifact(embedded().model) as artifact:
            checkpoint = open_checkpoint(embedded().checkpoint, artifact)
            for source in (artifact, checkpoint):
                source.read("blk.0.attn_q.weight")
                source.take("token_embd.weight", slice(3, 5))
            checkpoint.close()
    finally:
        torch.set_num_threads(before)
    assert seen == [threads] * 4
