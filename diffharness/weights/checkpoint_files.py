"""The files of a checkpoint folder: config.json, and the safetensors files, one or as many as an index names.

Pickled weights (`*.bin`) are never opened: they can run code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.words import counted, listed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMED = 5  # so many files are named in a message


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint folder; CheckpointError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: no {path.name}", hint="give the folder of the Hugging Face model, with its config"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found something else: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order; CheckpointError where they are missing or not all there."""
    single, index = folder / SINGLE, folder / INDEX
    if index.exists():
        return _shards(index)
    if single.exists():
        return [single]
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return loose
    if loose:
        raise CheckpointError(
            f"{folder}: {counted(len(loose), 'safetensors file')}, but no {INDEX} that says what is in them",
            hint=f"download {INDEX} too",
        )
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder}: expected *.safetensors, found only pickled weights ({pickled[0]}), which can run code "
            "and are never opened",
            hint="convert the checkpoint to safetensors",
        )
    raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}", hint="download the weights too")


def _shards(index: Path) -> list[Path]:
    folder, weight_map = index.parent, read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: expected an object `weight_map` of tensor names to file names")
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise CheckpointError(f"{index}: shard names must be plain file names, found {outside[0]!r}")
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing: {listed(missing, _NAMED)}",
            hint="download the missing shards",
        )
    return [folder / file for file in files]
