from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffharness.pipeline.pairs import SharedRows
from diffharness.weights.source import TensorInfo


class Source:
    label, arch = "x", "llama"
    metadata: Mapping[str, object] = {"general.architecture": "llama"}
    values = np.arange(40, dtype=np.float32).reshape(10, 4)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, (10, 4), "F32", 160) for name in ("token_embd.weight", "blk.0.attn_q.weight")}

    def read(self, name: str) -> np.ndarray:
        return self.values

    def take(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        return self.values[rows]


def test_rows_beyond_the_shared_vocabulary_are_not_seen() -> None:
    source = Source()
    shared = SharedRows(source, 7)
    assert shared.surplus == {"token_embd.weight": 3}
    info = shared.tensors["token_embd.weight"]
    assert (info.shape, info.n_bytes) == ((7, 4), 112)
    assert shared.read("token_embd.weight").shape == (7, 4)
    assert shared.take("token_embd.weight", slice(5, None)).shape == (2, 4)
    assert (shared.take("token_embd.weight", np.array([6, 0])) == source.values[[6, 0]]).all()
    assert shared.read("blk.0.attn_q.weight").shape == (10, 4)
    assert (shared.label, shared.arch, shared.metadata) == ("x", "llama", source.metadata)


def test_a_smaller_vocabulary_is_left_alone() -> None:
    assert SharedRows(Source(), 10).surplus == {}
