"""The strict engine: the artifact rewritten as F32, and settings without arithmetic noise.

What is left between it and the reference is the graph. The settings are configs/engines/strict.yaml;
which build runs, and on how many threads, stays as in the native settings.
"""

from __future__ import annotations

import os
from pathlib import Path

from diffharness.settings import EngineSettings, load_engine
from diffharness.weights.gguf_file import GgufFile
from diffharness.weights.gguf_write import write_gguf
from diffharness.weights.source import WeightSource

_OF_THE_BUILD = ("lib_dir", "python", "threads", "time_limit_s", "n_batch", "n_ubatch", "use_mmap")
_OF_THE_MODEL = ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
                 "yarn_beta_slow", "yarn_orig_ctx")  # fmt: skip


def strict_settings(native: EngineSettings) -> EngineSettings:
    """configs/engines/strict.yaml on the build, threads, batch sizes and rope parameters of `native`."""
    kept = _OF_THE_BUILD + _OF_THE_MODEL
    return load_engine("strict").changed(**{name: getattr(native, name) for name in kept})


def rope_parameters(settings: EngineSettings) -> dict[str, float]:
    """What the settings say of rotary embedding in the model's place."""
    return {name: value for name in _OF_THE_MODEL if (value := getattr(settings, name)) is not None}


def write_strict(source: WeightSource, gguf: GgufFile, out: str | os.PathLike[str]) -> Path:
    """`source`'s tensors as F32 under `gguf`'s metadata, tokenizer included. Raises OutputError if the disk is full."""
    path = Path(out)
    write_gguf(path, source, type_of=lambda info: "F32", kv_from=gguf)
    return path
