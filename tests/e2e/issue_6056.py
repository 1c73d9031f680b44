"""A copy of the embedded model damaged as Gemma-4-12B files were in unsloth #6056.

There, `layer_output_scale` had other values, and of every six layers two had matrices at a cosine of
0.93 to 0.97 to the checkpoint's and four at 0.24 to 0.70. Here too: scalars replaced, and matrices of the
layers 2 to 5 of each period of six mixed with noise, in the clean artifact's types.
"""

from __future__ import annotations

import re
from pathlib import Path

from diffharness.pipeline.damaging import DamageRequest
from diffharness.pipeline.damaging import run as apply
from diffharness.settings import data_dir, load_engine

EMBEDDED = data_dir("fixtures") / "tiny-gemma4"
CLEAN, CHECKPOINT, HELDOUT = EMBEDDED / "tiny-gemma4-Q4_K_M.gguf", EMBEDDED / "checkpoint", EMBEDDED / "heldout.json"

PERIOD, SPARED = 6, (0, 1)
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
    """Write the damaged artifact to `out`: the preset of `diffharness damage`."""
    engine = load_engine("native").changed(threads=1)
    apply(DamageRequest(source=CLEAN, out=out, how=["issue-6056"], engine=engine, checkpoint=CHECKPOINT))
    return out
