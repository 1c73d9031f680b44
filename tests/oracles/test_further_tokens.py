"""Files whose last block predicts a further token: neither the engine's forward nor the reference's runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffharness.fixture import from_ids, save_fixture
from diffharness.weights import names
from diffharness.weights.check import check_model
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_write import write_gguf
from diffharness.weights.source import Float32Array, IntArray, Overlay, TensorInfo
from diffharness.weights.synth import SynthSource
from tests.e2e.conftest import Pair
from tests.e2e.runs import graph_only

# What the further block's entry is of a key that has one by layer.
ENTRIES = {"attention.recurrent_layers": False, "attention.head_count_kv": 2, "feed_forward_length": 64}
OTHER_FORMS = ("embed_tokens", "shared_head_head", "gate_up_exps", "attn_q.bias", "attn_k.bias", "attn_v.bias")


class OneFurther(Overlay):
    """A synthetic model with one block more, of constants."""

    def __init__(self, base: SynthSource) -> None:
        arch = base.arch
        n_layer = base.metadata[f"{arch}.block_count"]
        metadata = dict(base.metadata) | {f"{arch}.block_count": n_layer + 1, f"{arch}.nextn_predict_layers": 1}
        for name, entry in ENTRIES.items():
            if isinstance(by_layer := metadata.get(f"{arch}.{name}"), list):
                metadata[f"{arch}.{name}"] = [*by_layer, entry]
        super().__init__(base, metadata=metadata)
        further = [rule for rule in names.for_arch(arch).rules(metadata) if rule.name.startswith(f"blk.{n_layer}.")]
        self.further = {
            rule.name: tuple(rule.shape)
            for rule in further
            if not any(form in rule.name for form in (*OTHER_FORMS, "attn_output.bias"))
        }
        infos = {name: TensorInfo(name, shape, "F32", 4 * int(np.prod(shape))) for name, shape in self.further.items()}
        self.tensors = {**base.tensors, **infos}

    def read(self, name: str) -> Float32Array:
        if name in self.further:
            return np.full(self.further[name], 0.01, np.float32)
        return super().read(name)

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return np.ascontiguousarray(self.read(name)[rows])


@pytest.mark.parametrize("arch", ["qwen3next", "qwen35", "qwen35moe", "nemotron_h_moe"])
def test_the_model_is_the_layers_before(arch: str, tmp_path: Path) -> None:
    source, gguf, fixture = OneFurther(SynthSource(arch)), tmp_path / "model.gguf", tmp_path / "ids.json"
    keys = {"general.architecture": arch, "tokenizer.ggml.model": "no_vocab", f"{arch}.vocab_size": 160}
    write_gguf(gguf, source, type_of=lambda info: "F32", extra_metadata=keys)
    with open_gguf(gguf) as artifact:
        assert len(source.further) > 10 and check_model(artifact) == []
    ids = np.random.default_rng(0).integers(0, 160, 40).tolist()
    save_fixture(from_ids(ids, name="random", chunk=64), fixture)
    runs = graph_only(Pair(gguf, tmp_path, fixture), tmp_path)
    final = runs.conventions or runs.definition
    assert final.ok and final.complete
