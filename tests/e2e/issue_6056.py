"""A copy of the embedded model damaged as Gemma-4-12B files were in unsloth #6056.

There, `layer_output_scale` had other values, and of every six layers two had matrices at a cosine of
0.93 to 0.97 to the checkpoint's and four at 0.24 to 0.70. Here too: scalars replaced, matrices of the
layers 2 to 5 of each period of six mixed with noise, and all quantized to the clean artifact's types.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from diffharness.engine.runner import Engine
from diffharness.settings import data_dir, load_engine
from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.convert import checkpoint_to_gguf
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import encode_floats, rewrite_gguf

EMBEDDED = data_dir("fixtures") / "tiny-gemma4"
CLEAN, CHECKPOINT, HELDOUT = EMBEDDED / "tiny-gemma4-Q4_K_M.gguf", EMBEDDED / "checkpoint", EMBEDDED / "heldout.json"

PERIOD, SPARED = 6, (0, 1)
COSINE = 0.45  # of the mixed matrices to the clean ones
_LAYER = re.compile(r"blk\.(\d+)\.")


def is_hit(name: str, n_dims: int) -> bool:
    """Whether the damage touches this tensor."""
    layer = _LAYER.match(name)
    if layer is None:
        return False
    if name.endswith("layer_output_scale.weight"):
        return True
    return n_dims > 1 and int(layer[1]) % PERIOD not in SPARED


def damage(out: Path) -> Path:
    """Write the damaged artifact to `out`."""
    plain, mixed = out.with_suffix(".plain"), out.with_suffix(".mixed")
    checkpoint_to_gguf(Checkpoint(CHECKPOINT), plain)
    with open_gguf(plain) as source, open_gguf(CLEAN) as clean:

        def tensor(info: Any, raw: Any) -> Any:
            if not is_hit(info.name, len(info.shape)):
                return None
            values = source.read(info.name)
            if len(info.shape) > 1:
                noise = np.random.default_rng(len(info.name) + info.n_bytes).standard_normal(info.shape)
                noise *= values.std() * np.sqrt(1 / COSINE**2 - 1)
                values = (values + noise).astype(np.float32)
            else:
                values = np.ones_like(values)
            return "F32", info.shape, encode_floats(values, "F32")

        rewrite_gguf(source, mixed, tensor=tensor)
        types = {name: info.type for name, info in clean.tensors.items()}
    Engine(load_engine("native").changed(threads=1)).quantize_like(mixed, out, types)
    plain.unlink()
    mixed.unlink()
    return out
