"""Sound models of another lineage: the embedded one trained on a little, and one from another seed.

They are trained on demand, the last for some six minutes on one core, and kept under `.cache/confusion` by a hash of
everything that makes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.confusion.cases import OTHER_SEED, TUNED
from diffharness.settings import data_dir

_FIXTURES = data_dir("fixtures")
_CHECKPOINT = _FIXTURES / "tiny-gemma4" / "checkpoint"
_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "confusion"
_SCRIPTS = ("make_tiny_gemma4.py", "tiny_grammar.py", "tiny_training.py")


@dataclass(frozen=True)
class _Training:
    steps: int
    learning_rate: float
    from_seed: int | None = None  # None: from the embedded checkpoint
    seed: int = 11  # of the text


TRAININGS: dict[str, _Training] = {
    TUNED[0]: _Training(6, 3e-4),
    TUNED[1]: _Training(24, 1e-3),
    OTHER_SEED: _Training(200, 6e-3, from_seed=7),
}


def trained(model: str) -> Path:
    """The checkpoint folder of one of `TRAININGS`."""
    training = TRAININGS[model]
    digest = hashlib.sha256(repr(training).encode())
    for path in (*(_FIXTURES / name for name in _SCRIPTS), _CHECKPOINT / "model.safetensors"):
        digest.update(path.read_bytes())
    folder = _CACHE / f"{model}-{digest.hexdigest()[:12]}"
    if not (folder / "config.json").exists():
        _train(training, folder)
    return folder


def _train(training: _Training, folder: Path) -> None:
    sys.path.insert(0, str(_FIXTURES))  # the scripts import one another by plain names
    try:
        from make_tiny_gemma4 import Trained, fresh_weights  # type: ignore[import-not-found]
        from tiny_training import Parameters, Recipe, train  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(_FIXTURES))
    import torch
    from tokenizers import Tokenizer

    from diffharness.reference import archs
    from diffharness.weights.checkpoint import Checkpoint
    from diffharness.weights.checkpoint_write import write_checkpoint

    print(f"training {folder.name}: {training.steps} steps", file=sys.stderr, flush=True)
    source = Checkpoint(_CHECKPOINT)
    metadata = dict(source.metadata)
    if training.from_seed is None:
        weights = Parameters({name: torch.from_numpy(source.read(name).copy()) for name in source.tensors})
    else:
        weights = fresh_weights(metadata, training.from_seed)
    recipe = Recipe(
        steps=training.steps,
        seed=training.seed,
        learning_rate=training.learning_rate,
        warmup=min(40, training.steps // 5),
        lengths=(256,),
    )
    tokenizer = Tokenizer.from_file(str(_CHECKPOINT / "tokenizer.json"))
    with contextlib.redirect_stdout(io.StringIO()):
        train(archs.build(metadata), weights, tokenizer, recipe)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_checkpoint(part, Trained(weights, metadata), dtype="BF16")
    for path in _CHECKPOINT.glob("tokenizer*"):
        shutil.copy(path, part)
    part.rename(folder)
