"""The simulation as a WeightSource, and the file that is written from it: the same values, the same bytes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from diffharness.errors import BadInputError
from diffharness.forensics.recipes import IntN, Recipe, Simulated, make_plan, round_to_blocks, write_recipe
from diffharness.weights import gguf_write
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.source import Float32Array
from tests.reference.random_source import LLAMA, RandomSource

WIDE = LLAMA | {
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.key_length": 16,
    "llama.attention.value_length": 16,
    "llama.rope.dimension_count": 16,
}


def by_gguf_py(rows: Float32Array, type_name: str, importance: Float32Array | None = None) -> NDArray[np.uint8]:
    """A quantizer that needs no engine."""
    return np.asarray(gguf.quants.quantize(rows, gguf.GGMLQuantizationType[type_name]))


def simulated(tensors: dict[str, object], **more: object) -> tuple[RandomSource, Simulated]:
    source = RandomSource(WIDE)
    recipe = Recipe.model_validate({"name": "mine", "tensors": tensors, **more})
    return source, Simulated(source, make_plan(recipe, source.tensors), by_gguf_py)


def test_values_are_rounded_and_others_are_not() -> None:
    source, made = simulated({"*ffn_up*": {"bits": 4, "block": 32}, "*ffn_down*": "Q8_0", "*attn_q.weight": "BF16"})
    up, down = "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"
    np.testing.assert_array_equal(made.read(up), round_to_blocks(source.values[up], IntN(bits=4, block=32)))
    expected = gguf.quants.dequantize(by_gguf_py(source.values[down], "Q8_0"), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(made.read(down), expected)
    q = "blk.1.attn_q.weight"
    assert not np.array_equal(made.read(q), source.values[q])
    np.testing.assert_allclose(made.read(q), source.values[q], rtol=2**-8)
    for name in ("blk.1.attn_norm.weight", "blk.1.attn_k.weight"):
        np.testing.assert_array_equal(made.read(name), source.values[name])
    assert made.tensors[up].type == "int4 block 32" and made.tensors[down].type == "Q8_0"
    assert made.tensors[up].n_bytes == source.tensors[up].n_elements * 4.5 / 8
    assert (made.arch, made.metadata) == ("llama", source.metadata) and "mine" in made.label


@pytest.mark.parametrize("scheme", ["Q8_0", "F16", {"bits": 3, "block": 16, "asymmetric": True}])
def test_rows_are_taken_without_the_others(scheme: object) -> None:
    source, made = simulated({"*": scheme})
    rows = np.array([7, 0, 31])
    whole = made.read("token_embd.weight")
    source.reads.clear()
    np.testing.assert_array_equal(made.take("token_embd.weight", rows), whole[rows])
    np.testing.assert_array_equal(made.take("token_embd.weight", slice(3, 9)), whole[3:9])
    np.testing.assert_array_equal(
        made.take("output_norm.weight", slice(3, 9)), source.values["output_norm.weight"][3:9]
    )
    assert source.takes[:2] == [("token_embd.weight", 3), ("token_embd.weight", 6)] and not source.reads
    assert made.take("token_embd.weight", slice(0, 0)).shape == (0, 64)


def test_what_is_written_is_what_was_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_write, "_CHUNK", 1000)  # a few rows at a time
    source, made = simulated({"*ffn_down*": "Q8_0", "*attn_k*": "F16", "*": "Q4_0"})
    path = tmp_path / "out.gguf"
    extra = {"general.architecture": "llama", "general.name": "random"}
    write_recipe(path, source, made._plan, by_gguf_py, extra)
    with open_gguf(path) as artifact:
        assert list(artifact.tensors) == list(source.values)
        for name, info in artifact.tensors.items():
            assert (info.type, info.shape, info.n_bytes) == (
                made.tensors[name].type,
                made.tensors[name].shape,
                made.tensors[name].n_bytes,
            )
            np.testing.assert_array_equal(artifact.read(name), made.read(name))
        assert artifact.metadata["general.quantization_version"] == 2
        assert artifact.metadata["diffharness.recipe"] == "mine"
        assert artifact.metadata["llama.block_count"] == 3
    assert not list(tmp_path.glob("*.part"))


def test_integers_are_not_written(tmp_path: Path) -> None:
    source, made = simulated({"*": {"bits": 4, "block": 32}})
    with pytest.raises(BadInputError, match=r"int4 block 32 for token_embd\.weight and \d+ more") as caught:
        write_recipe(tmp_path / "out.gguf", source, made._plan, by_gguf_py, {})
    assert "Q4_0" in str(caught.value.hint)
    with pytest.raises(ValueError, match="simulated only"):
        list(made.encoded("token_embd.weight"))
    assert not list(tmp_path.iterdir())


def test_a_writer_that_dies_leaves_nothing(tmp_path: Path) -> None:
    source, made = simulated({"*": "Q4_0"})

    def dies(rows: Float32Array, type_name: str, importance: Float32Array | None = None) -> NDArray[np.uint8]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_recipe(tmp_path / "out.gguf", source, made._plan, dies, {})
    assert not list(tmp_path.iterdir())
