"""The embedded model changed in ways that are known, quantized like the clean artifact."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffharness.engine.runner import Engine
from diffharness.reference import archs
from diffharness.settings import data_dir, load_engine
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import encode_floats, rewrite_gguf
from tests.e2e.issue_6056 import CHECKPOINT, CLEAN, HELDOUT

Values = np.ndarray[Any, np.dtype[np.float32]]
Change = Callable[[str, Values], "Values | None"]
NATIVE = load_engine("native").changed(threads=1)

__all__ = ["CHECKPOINT", "CLEAN", "HELDOUT", "NATIVE", "noise", "other_basis", "trained", "variant"]


def variant(out: Path, change: Change) -> Path:
    """The checkpoint with some tensors changed (None: as it is), in the clean artifact's types."""
    plain, mixed = out.with_suffix(".plain"), out.with_suffix(".mixed")
    checkpoint_to_gguf(Checkpoint(CHECKPOINT), plain)
    with open_gguf(plain) as source, open_gguf(CLEAN) as clean:

        def tensor(info: Any, raw: Any) -> Any:
            values = change(info.name, source.read(info.name))
            return None if values is None else ("F32", info.shape, encode_floats(values.astype(np.float32), "F32"))

        rewrite_gguf(source, mixed, tensor=tensor)
        types = {name: info.type for name, info in clean.tensors.items()}
    Engine(NATIVE).quantize_like(mixed, out, types)
    plain.unlink()
    mixed.unlink()
    return out


def noise(share: float, wanted: Callable[[str], bool] = lambda name: True) -> Change:
    """White noise of this share of their size added to the matrices."""
    random = np.random.default_rng(0)

    def change(name: str, values: Values) -> Values | None:
        if values.ndim < 2 or not wanted(name):
            return None
        return values + random.normal(0, share * values.std(), values.shape).astype(np.float32)

    return change


def trained(steps: int, rate: float) -> Change:
    """Trained further on a text like its own, with the training that made it."""
    sys.path.insert(0, str(data_dir("fixtures")))
    try:
        import tiny_training
    finally:
        sys.path.pop(0)
    from tokenizers import Tokenizer

    source = Checkpoint(CHECKPOINT)
    weights = tiny_training.Parameters({name: torch.from_numpy(source.read(name).copy()) for name in source.tensors})
    recipe = tiny_training.Recipe(steps=steps, seed=77, tokens=1024, learning_rate=rate, warmup=1, lengths=(256,))
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    tiny_training.train(archs.build(source.metadata), weights, tokenizer, recipe)
    return lambda name, values: weights.tensors[name].detach().numpy()


def other_basis() -> Change:
    """The same function with the residual stream's components in another order, as another training has it."""
    order = np.random.default_rng(0).permutation(Checkpoint(CHECKPOINT).tensors["token_embd.weight"].shape[1])
    written = ("attn_output.weight", "ffn_down.weight")
    inside = ("attn_q_norm.weight", "attn_k_norm.weight", "layer_output_scale.weight", "rope_freqs.weight")

    def change(name: str, values: Values) -> Values | None:
        if name.endswith(inside):
            return None
        if values.ndim == 1 or name.endswith(written):
            return np.ascontiguousarray(values[order])
        return np.ascontiguousarray(values[:, order])

    return change
