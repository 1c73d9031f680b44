"""`SynthSource`: a small random model of any architecture that `weights.names` knows, as a `WeightSource`.

The architecture's map gives a config.json of a wanted size (`example`), the GGUF keys of it, and every tensor with its
shape; how values are drawn is the map's too. A tensor's values depend on the seed and its name alone, so that the
same model comes out on every machine and in every order of reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from diffharness.errors import UnsupportedError
from diffharness.weights import names
from diffharness.weights.names._draw import default_draw
from diffharness.weights.names._map import Piece, Sizes, TensorRule
from diffharness.weights.source import Float32Array, IntArray, Metadata, TensorInfo


class SynthSource:
    """A random model of `arch`; UnsupportedError where the architecture is unknown.

    `config` is the config.json that it has, `metadata` the GGUF keys. What is kept in another form on one side is
    drawn so that both forms are exact.
    """

    def __init__(
        self, arch: str, sizes: Sizes | None = None, *, seed: int = 0, changes: Mapping[str, Any] | None = None
    ) -> None:
        self.map = names.for_arch(arch)
        self.seed = seed
        self.label = f"{arch}-synthetic"
        self.config: dict[str, Any] = self.map.example(sizes or Sizes()) | dict(changes or {})
        self._metadata = self.map.metadata(self.config)
        if self._metadata["general.architecture"] != arch:
            raise UnsupportedError(f"the config of {arch} makes a {self._metadata['general.architecture']} model")
        self.rules = {rule.name: rule for rule in self.map.rules(self._metadata) if _is_made(rule)}
        self._tensors = {
            name: TensorInfo(name, tuple(rule.shape), "F32", 4 * int(np.prod(rule.shape)))
            for name, rule in self.rules.items()
        }

    @property
    def arch(self) -> str:
        return self.map.arch

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> Float32Array:
        rule = self.rules[name]
        shape = tuple(rule.shape)
        if rule.values is not None:
            return rule.values().reshape(shape)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = np.random.default_rng(list(digest))
        values = (rule.draw or default_draw(name, shape))(generator, shape)
        if isinstance(rule.layout, Piece) or not rule.hf:
            return values
        return rule.layout.to_gguf(rule.layout.to_hf(values)).reshape(shape)

    def take(self, name: str, rows: slice | IntArray) -> Float32Array:
        return np.ascontiguousarray(self.read(name)[rows])

    @cached_property
    def n_parameters(self) -> int:
        return sum(info.n_elements for info in self._tensors.values())


def _is_made(rule: TensorRule) -> bool:
    """Whether a synthetic model has the tensor: what every model has, and what the map says beside."""
    made = rule.required if rule.synthetic is None else rule.synthetic
    return made and (bool(rule.hf) or rule.values is not None)
