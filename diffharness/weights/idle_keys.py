"""Keys given for a synthetic config.json that no rule of its architecture looks at, such as misspelt ones."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from diffharness.errors import BadInputError
from diffharness.weights import names
from diffharness.weights.checkpoint import MALFORMED
from diffharness.weights.names._map import ArchMap, Config, Sizes

# Whoever looks at a key makes another model of one of these, or refuses it.
_TRIALS: tuple[object, ...] = ("no such value", True, False, 3, 0.5, [3], {"no": "value"})


def idle_keys(arch: str, sizes: Sizes, changes: Mapping[str, Any]) -> list[str]:
    """Which of `changes` change neither GGUF keys nor tensors, whatever their values were.

    A key of the example's config.json is none of them, nor is one whose value only happens to be the default.
    """
    arch_map = names.for_arch(arch)
    example = arch_map.example(sizes)
    config = example | dict(changes)
    return [key for key in changes if key not in example and not _is_looked_at(arch_map, config, key)]


def nearest_to(key: str, arch: str, sizes: Sizes) -> str | None:
    """The key of the example's config.json that is spelled most like it."""
    near = difflib.get_close_matches(key, names.for_arch(arch).example(sizes), n=1)
    return near[0] if near else None


def _is_looked_at(arch_map: ArchMap, config: Config, key: str) -> bool:
    without = _model({name: value for name, value in config.items() if name != key}, arch_map)
    return any(_model({**config, key: value}, arch_map) != without for value in (config[key], *_TRIALS))


def _model(config: Config, arch_map: ArchMap) -> object:
    """What the config describes, comparable; the error where it describes nothing."""
    try:
        metadata = arch_map.metadata(config)
        return dict(metadata), {rule.name: tuple(rule.shape) for rule in arch_map.rules(metadata)}
    except BadInputError as error:
        return error.message
    except MALFORMED as error:
        return repr(error)
