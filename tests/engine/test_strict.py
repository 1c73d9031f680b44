"""Strict: the file is F32 throughout, keeps its metadata, and runs without arithmetic noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffharness.engine.runner import Engine
from diffharness.engine.strict import strict_settings, write_strict
from diffharness.settings import EngineSettings
from diffharness.weights.gguf_file import open_gguf


def test_settings_keep_the_build_and_drop_the_noise(tmp_path: Path) -> None:
    native = EngineSettings(name="mine", threads=3, lib_dir=tmp_path, n_ubatch=32, type_k="Q8_0", type_v="Q8_0")
    strict = strict_settings(native)
    assert (strict.name, strict.threads, strict.lib_dir, strict.n_ubatch) == ("strict", 3, tmp_path, 32)
    assert (strict.type_k, strict.type_v, strict.flash_attn, strict.extra_bufts) == ("F32", "F32", "off", False)


def test_strict_run_of_a_quantized_file(
    llama_gguf: Path, quick: EngineSettings, ids: list[int], tmp_path: Path
) -> None:
    quantized = Engine(quick).quantize(llama_gguf, tmp_path / "q.gguf", "Q8_0")
    artifact = open_gguf(quantized)
    strict = write_strict(artifact, artifact, tmp_path / "strict.gguf")
    rewritten = open_gguf(strict)
    assert {info.type for info in rewritten.tensors.values()} == {"F32"}
    assert {key: rewritten.metadata[key] for key in artifact.metadata if key != "general.file_type"} == {
        key: value for key, value in artifact.metadata.items() if key != "general.file_type"
    }
    for name in artifact.tensors:
        np.testing.assert_array_equal(artifact.read(name), rewritten.read(name), err_msg=name)
    engine = Engine(strict_settings(quick))
    whole = engine.capture(strict, [ids], tmp_path / "a").open().read("logits")
    pieces = Engine(engine.settings.changed(n_ubatch=8)).capture(strict, [ids], tmp_path / "b").open().read("logits")
    assert np.square(whole - pieces).sum() <= 1e-11 * np.square(whole).sum()
