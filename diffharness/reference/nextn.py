"""Layers that predict further tokens (multi-token prediction, `nextn`): blocks of a file that no forward here has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any, TypeVar

from diffharness.reference.hparams import HyperParameters
from diffharness.weights.source import Metadata

Read = TypeVar("Read", bound=HyperParameters)


def without_nextn(hp: Read) -> Read:
    """The same hyperparameters with a `block_count` without the last `nextn_predict_layers`.

    So lists by layer may count those layers or not. Raises UnsupportedError where no layer would be left.
    """
    key, n_nextn = hp.key("block_count"), hp.integer("nextn_predict_layers", 0)
    if n_nextn == 0:
        return hp
    n_block = hp.count("block_count")
    if not 0 < n_nextn < n_block:
        hp.refuse("nextn_predict_layers", n_nextn, f"fewer than the file's {n_block} blocks")
    main = copy(hp)
    main.metadata = _Instead(hp.metadata, {key: n_block - n_nextn})
    return main


class _Instead(Mapping[str, Any]):
    """Metadata with some values in others' places."""

    def __init__(self, metadata: Metadata, instead: dict[str, Any]) -> None:
        self._metadata, self._instead = metadata, instead

    def __getitem__(self, key: str) -> Any:
        return self._instead[key] if key in self._instead else self._metadata[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metadata)

    def __len__(self) -> int:
        return len(self._metadata)
