"""A synthetic model as GGUF, checkpoint and fixture in one folder: the wiring of `diffharness synth`."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffharness.engine.quantizer import Quantizer
from diffharness.errors import ArtifactFileError, BadInputError, CheckpointError, OutputError
from diffharness.fixture import Fixture, from_ids, save_fixture
from diffharness.records.synth import SynthRecord
from diffharness.reference import archs
from diffharness.settings import EngineSettings
from diffharness.weights import names
from diffharness.weights.checkpoint import MALFORMED, Checkpoint
from diffharness.weights.checkpoint_files import SINGLE
from diffharness.weights.checkpoint_write import write_checkpoint
from diffharness.weights.convert import gguf_metadata
from diffharness.weights.dequant import BLOCKS
from diffharness.weights.gguf_file import open_gguf
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import Bytes, RawTensor, encode_floats, stays_f32, write_tensors
from diffharness.weights.idle_keys import idle_keys, nearest_to
from diffharness.weights.names._map import Sizes
from diffharness.weights.source import TensorInfo, WeightSource
from diffharness.weights.synth import SynthSource

_FLOATS = ("F32", "F16", "BF16")
_NO_WEIGHTS = frozenset(("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"))  # no quantizer of ggml's makes them
_LONGEST = (1 << 31) - 1
_FILES = ("config.json", SINGLE)  # of a checkpoint that synth wrote
_MOST_ELEMENTS = 1 << 29  # of one tensor, which is in memory as a whole: 2 GiB


@dataclass(frozen=True)
class SynthRequest:
    """One synthetic model. `changes` are keys of config.json; `engine` is the build whose quantizer is used."""

    arch: str
    out: Path
    engine: EngineSettings
    sizes: Sizes = field(default_factory=Sizes)
    type_name: str = "F32"
    seed: int = 0
    n_tokens: int = 128
    changes: Mapping[str, Any] = field(default_factory=dict)
    repro: str = ""


def run(request: SynthRequest) -> SynthRecord:
    """Write `OUT/<arch>-<type>.gguf`, `OUT/checkpoint/` and `OUT/ids.json`.

    The GGUF is made of the checkpoint as it was written. Raises UnsupportedError for an unknown architecture,
    BadInputError for sizes that make no model and for `changes` without effect, OutputError where OUT cannot be
    written, EngineError where the quantizer dies.
    """
    type_name = request.type_name.upper()
    known = [name for name in BLOCKS if name not in _NO_WEIGHTS]
    if type_name not in known:
        raise BadInputError(f"expected a tensor type, found {request.type_name!r}", hint=f"known: {', '.join(known)}")
    if request.sizes.n_ctx > _LONGEST:
        raise BadInputError(
            f"expected a context of at most {_LONGEST} positions, found {request.sizes.n_ctx}",
            hint="llama.cpp reads it as 32 bits",
        )
    if request.n_tokens > request.sizes.n_ctx:
        raise BadInputError(
            f"expected a fixture no longer than the model's context of {request.sizes.n_ctx}, found {request.n_tokens}",
            hint="give a larger --context, or fewer --tokens",
        )
    source = _source(request)
    folder = request.out / "checkpoint"
    _require_own(folder)
    gguf = request.out / f"{request.arch}-{type_name}.gguf"
    with _all_or_nothing(request.out, folder):
        write_checkpoint(folder, source, config=source.config)
        checkpoint = Checkpoint(folder)
        with Quantizer(request.engine) as quantizer:
            narrow = _write(checkpoint, gguf, type_name, quantizer)
        fixture = _ids(request, checkpoint)
        save_fixture(fixture, request.out / "ids.json")
    with open_gguf(gguf) as written:
        types = Counter(info.type for info in written.tensors.values())
    return SynthRecord(
        arch=request.arch,
        seed=request.seed,
        gguf=str(gguf),
        checkpoint=str(folder),
        fixture=str(request.out / "ids.json"),
        n_tokens=fixture.n_tokens,
        n_layer=archs.build(checkpoint.metadata).n_layer,
        n_tensors=len(checkpoint.tensors),
        n_parameters=source.n_parameters,
        n_bytes=gguf.stat().st_size,
        types=dict(types),
        narrow=narrow,
        config=source.config,
        repro=request.repro,
    )


def _require_own(folder: Path) -> None:
    """OutputError for a checkpoint that is not synth's: overwritten in part, it would be a mixture of two models."""
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in _FILES) if folder.is_dir() else []
    if foreign:
        raise OutputError(
            f"{folder} holds {foreign[0]}, which is not of a synthetic model", hint="give another folder as OUT"
        )


@contextlib.contextmanager
def _all_or_nothing(*folders: Path) -> Iterator[None]:
    """Where the block ends early, Ctrl-C included, those of the folders that it made go again with what is in them."""
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def parse_changes(words: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` as keys of config.json; a value is JSON, or else a string. BadInputError for other words."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"\w+", key):
            raise BadInputError(f"expected KEY=VALUE, found {word!r}", hint="--set sliding_window=16")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _source(request: SynthRequest) -> SynthSource:
    """The model, with errors in the words of whoever asked for these sizes."""
    hint = "sizes must fit each other: heads a multiple of KV heads, no more experts used than there are"
    names.for_arch(request.arch)
    if request.sizes.n_expert_used > request.sizes.n_expert:
        raise BadInputError(f"{request.sizes.n_expert_used} of {request.sizes.n_expert} experts used", hint=hint)
    try:
        source = SynthSource(request.arch, request.sizes, seed=request.seed, changes=request.changes)
        archs.build(source.metadata)
    except (CheckpointError, ArtifactFileError) as error:
        raise BadInputError(f"{request.arch} in these sizes makes no model: {error.message}", hint=hint) from error
    except MALFORMED as error:
        said = f"{type(error).__name__}: {error}"
        raise BadInputError(f"{request.arch} in these sizes makes no model: {said}", hint=hint) from error
    _refuse_idle(request)
    largest = max(source.tensors.values(), key=lambda info: info.n_elements)
    if largest.n_elements > _MOST_ELEMENTS:
        raise BadInputError(
            f"tensor {largest.name} would have {largest.n_elements} values, expected at most {_MOST_ELEMENTS}",
            hint="make the model smaller",
        )
    return source


def _refuse_idle(request: SynthRequest) -> None:
    """A model that lacks what was asked for, for want of the right spelling, is not made."""
    for key in idle_keys(request.arch, request.sizes, request.changes):
        near = nearest_to(key, request.arch, request.sizes)
        raise BadInputError(
            f"expected a key of config.json that makes a difference to {request.arch}, found {key!r}, which changes "
            "neither GGUF keys nor tensors",
            hint=f"the nearest is {near}" if near else "the checkpoint's config.json of a model without --set has them",
        )


def _ids(request: SynthRequest, checkpoint: Checkpoint) -> Fixture:
    """Random ids, the same for the same seed and vocabulary."""
    n_vocab = checkpoint.tensors["token_embd.weight"].shape[0]
    ids = np.random.default_rng(request.seed).integers(0, n_vocab, request.n_tokens).tolist()
    return from_ids(ids, name=f"random ids, seed {request.seed}", chunk=request.n_tokens)


def _write(source: Checkpoint, path: Path, type_name: str, quantizer: Quantizer) -> list[str]:
    """The GGUF; returns the matrices whose rows are no whole blocks of the type, which stay F32."""
    narrow, tensors = [], []
    for info in source.tensors.values():
        if type_name == "F32" or stays_f32(info.name, info.shape):
            wanted = "F32"
        elif info.shape[-1] % BLOCKS[type_name][0]:
            narrow.append(info.name)
            wanted = "F32"
        else:
            wanted = type_name
        tensors.append(_tensor(source, info, wanted, quantizer))
    metadata = {**source.metadata, **gguf_metadata(source)}
    write_tensors(path, {key: encode_value(key, value) for key, value in metadata.items()}, tensors)
    return narrow


def _tensor(source: WeightSource, info: TensorInfo, type_name: str, quantizer: Quantizer) -> RawTensor:
    def data() -> list[Bytes]:
        values = source.read(info.name)
        if type_name in _FLOATS:
            return [encode_floats(values, type_name)]
        return [quantizer.quantize(values.reshape(-1, info.shape[-1]), type_name)]

    return RawTensor(info.name, info.shape, type_name, data)
