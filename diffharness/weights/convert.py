"""A checkpoint as a GGUF file that llama.cpp loads: tensors and hyperparameters by the map, vocabulary by `vocab`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffharness.weights.checkpoint import Checkpoint
from diffharness.weights.gguf_write import write_gguf
from diffharness.weights.vocab import tokenizer_metadata


def gguf_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every KV of the checkpoint's GGUF beside its hyperparameters: general keys and the vocabulary."""
    n_vocab = checkpoint.tensors["token_embd.weight"].shape[0]
    return {
        "general.architecture": checkpoint.arch,
        "general.type": "model",
        "general.name": checkpoint.label,
        f"{checkpoint.arch}.vocab_size": n_vocab,
        **tokenizer_metadata(checkpoint.path, n_vocab, arch=checkpoint.arch),
    }


def checkpoint_to_gguf(checkpoint: Checkpoint, path: str | Path, *, type_name: str = "F32") -> None:
    """Write `checkpoint` as a GGUF whose matrices are F32, F16 or BF16; vectors and routers stay F32."""
    write_gguf(path, checkpoint, type_of=lambda info: type_name, extra_metadata=gguf_metadata(checkpoint))
